"""Whole runs: what they train, what they leave, and what survives an interruption."""

import json

import pytest
import torch
from support.runs import flag_words

from iterbatch.bench.listener import Listener
from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.config import LAST, StrategyConfig
from iterbatch.data.corpus import read_corpus
from iterbatch.data.windows import prepare_eval
from iterbatch.errors import RunError
from iterbatch.evaluation.perplexity import score
from iterbatch.evaluation.trained import load_trained
from iterbatch.model.cut import CutModel
from iterbatch.records.read import read_config
from iterbatch.records.record import BatchRecord, EvalRecord, read_records
from iterbatch.runtime.processes import make_accelerator
from iterbatch.study.run import run as run_bench

SUMMARY = {
    "strategy",
    "seed",
    "val_ppl",
    "test_ppl",
    "val_word_ppl",
    "bits_per_byte",
    "batches",
    "updates",
    "mean_repeats",
    "tokens_unique",
    "tokens_trained",
    "flops",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_mb",
}


def _arm_files(strategy, seed):
    names = [
        "batches.jsonl",
        "evals.jsonl",
        "samples.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ]
    return [f"{strategy}/seed{seed}/{name}" for name in names]


@pytest.mark.parametrize("source", ["wikitext-2", "dialogue/casino"])
def test_every_strategy_on_real_text_leaves_everything(real_text, tmp_path, source):
    config = make_config(
        dataset="wikitext" if "wikitext" in source else "dialogue",
        data_dir=real_text / source,
        epochs=2,
        batch_size=2,
        max_length=64,
        max_train_tokens=1024,
        max_eval_tokens=300,
        probe_rate=1.0,
        probe_budget=1.0,
        seeds=[0, 1],
        save_dir=tmp_path,
        run_name="run",
        dtype="float32",
        evals=2,
    )
    run_dir = run_bench(config)
    assert run_dir == tmp_path / "run"
    expected = [
        "config.yaml",
        "manifest.json",
        "study.json",
        "summary.json",
        "summary.md",
        "ppl_vs_flops.png",
        "repeats.png",
    ]
    expected += [
        "report.html",
        "report.md",
        "metrics.csv",
        "figures/perplexity_flops.pdf",
        "figures/repeats.png",
    ]
    expected += [
        file
        for strategy in StrategyConfig().strategies
        for seed in (0, 1)
        for file in _arm_files(strategy, seed)
    ]
    assert [
        file for file in expected if not (run_dir / file).is_file() or not (run_dir / file).stat().st_size
    ] == []
    tracked = {file.parent for file in (run_dir / "tracking").rglob("events.out.tfevents*")}
    assert tracked == {
        run_dir / "tracking" / strategy / f"seed{seed}"
        for strategy in StrategyConfig().strategies
        for seed in (0, 1)
    }

    rows = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert [(row["strategy"], row["seed"]) for row in rows] == [
        (strategy, seed) for strategy in StrategyConfig().strategies for seed in (0, 1)
    ]
    for row in rows:
        assert set(row) >= SUMMARY
        folder = run_dir / row["strategy"] / f"seed{row['seed']}"
        batches, evals = (
            list(read_records(folder / "batches.jsonl", BatchRecord)),
            list(read_records(folder / "evals.jsonl", EvalRecord)),
        )
        assert row["batches"] == len(batches) == 16
        assert row["updates"] == sum(record.repeats_done for record in batches)
        assert row["flops"] == pytest.approx(sum(record.flops for record in batches))
        assert row["tokens_trained"] == sum(record.tokens * record.repeats_done for record in batches)
        assert row["tokens_unique"] == sum(record.tokens for record in batches) / 2
        assert [record.fraction for record in evals if record.split == "validation"] == [0.0, 0.5, 1.0]
        assert (row["val_ppl"], row["base_val_ppl"]) == (evals[-2].ppl, evals[0].ppl)
        assert (
            "wikitext" in source or row["val_ppl"] < row["base_val_ppl"]
        )  # WikiText-2 the base knows already
        assert row["test_ppl"] == evals[-1].ppl
    by_name = {row["strategy"]: row for row in rows if row["seed"] == 0}
    assert by_name["baseline"]["mean_repeats"] == 1
    assert by_name["learnable"]["flops_probe"] > 0
    ratio = by_name["abr"]["flops"] / by_name["baseline"]["flops"]
    assert ratio == pytest.approx(by_name["abr"]["mean_repeats"], rel=0.05)  # a short batch costs less

    page = (run_dir / "summary.md").read_text(encoding="utf-8")
    places = [page.index(f"| {strategy} |") for strategy in StrategyConfig().strategies]
    assert places == sorted(places)  # in the order they were asked for
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["data"]["documents"]["train"] > 100
    assert {*manifest["origin"]["text"]} == {"train", "validation", "test"}
    assert len(manifest["origin"]["weights"]) == len(manifest["origin"]["tokenizer"]) == 64
    assert manifest["data"]["order_sha256"]["0"] != manifest["data"]["order_sha256"]["1"]


def test_original_commands_run_through_with_local_folders(real_text, tiny_folder, tmp_path, capsys):
    import shlex

    from support.commands import ORIGINAL

    for number, command in enumerate(ORIGINAL):
        words = shlex.split(command.replace("huggyllama/llama-7b", "LOCAL"))
        words = [str(tiny_folder) if word == "LOCAL" else word for word in words]
        caps = [
            "--data_dir",
            str(real_text / "wikitext-2"),
            "--max_train_tokens",
            "2048",
            "--max_eval_tokens",
            "200",
            "--log_with",
            "none",
        ]
        assert main(["train", *words, *caps, "--save_dir", str(tmp_path), "--run_name", str(number)]) == 0
        rows = json.loads((tmp_path / str(number) / "summary.json").read_text(encoding="utf-8"))
        assert [row["strategy"] for row in rows] == command.split("--strategies ")[1].split(" --")[0].split()
        assert all(
            row["batches"] == 12 for row in rows
        )  # 16 blocks of the model's context, one of them probe text or none, 4 a batch, 3 epochs


def test_arms_of_a_seed_are_paired_and_a_seed_repeats_itself(tiny, tmp_path):
    def records(name, **flags):
        config = make_config(
            **tiny,
            strategies=["baseline", "learnable"],
            probe_rate=0.5,
            save_dir=tmp_path,
            run_name=name,
            **flags,
        )
        folder = run_bench(config)
        return [
            [*read_records(folder / arm / "seed7" / "batches.jsonl", BatchRecord)]
            for arm in ("baseline", "learnable")
        ]

    first, second = records("one", seeds=[7]), records("two", seeds=[7])
    assert first[0][0].initial_loss == first[1][0].initial_loss  # same adapter, same first batch
    for one, two in zip(first, second, strict=True):
        assert [{**vars(record), "seconds": 0} for record in one] == [
            {**vars(record), "seconds": 0} for record in two
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_adapter_reproduces_the_reported_perplexity(tiny, tmp_path, dtype):
    """On the plain Hugging Face folder, with PEFT's own loader."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = tiny | {"dtype": dtype}
    config = make_config(**flags, strategies=["abr"], save_dir=tmp_path, run_name="run")
    run_dir = run_bench(config)
    reported = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))[0]["val_ppl"]
    base = AutoModelForCausalLM.from_pretrained(tiny["model_name"], dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, str(run_dir / "abr" / "seed0" / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny["model_name"])
    text = prepare_eval(read_corpus("pydocs").splits["validation"], tokenizer, 32, 200)
    accelerator = make_accelerator("bf16" if dtype == "bfloat16" else "no")
    result = score(
        accelerator.prepare_model(CutModel(model), evaluation_mode=True),
        text,
        accelerator,
        pad_id=tokenizer.pad_token_id,
    )
    assert result.ppl == pytest.approx(reported, rel=1e-4)
    assert result.ppl != pytest.approx(
        json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))[0]["base_val_ppl"], rel=1e-2
    )


def test_flops_match_gives_every_arm_the_baselines_compute(tiny, tmp_path):
    config = make_config(
        **tiny, strategies=["baseline", "abr"], match="flops", epochs=2, save_dir=tmp_path, run_name="run"
    )
    rows = {
        row["strategy"]: row
        for row in json.loads((run_bench(config) / "summary.json").read_text(encoding="utf-8"))
    }
    assert rows["abr"]["mean_repeats"] > 1.5
    assert rows["abr"]["flops"] == pytest.approx(rows["baseline"]["flops"], rel=0.15)
    assert rows["abr"]["batches"] < rows["baseline"]["batches"] == 8


class Interrupting(Listener):
    """Presses Ctrl-C in the middle of the second arm."""

    def arm_started(self, strategy, seed):
        self.strategy = strategy

    def batch_done(self, record, fraction):
        if self.strategy == "abr" and record.batch == 1:
            raise KeyboardInterrupt


def test_interruption_keeps_records_and_resume_goes_on(tiny, tmp_path, monkeypatch, capsys):
    from iterbatch.cli import progress

    flags = flag_words(tiny | {"strategies": ["baseline", "abr"], "save_dir": tmp_path, "run_name": "run"})
    with monkeypatch.context() as patch:
        patch.setattr(
            progress.RichListener,
            "batch_done",
            lambda self, record, fraction: Interrupting.batch_done(self, record, fraction),
        )
        start = progress.RichListener.arm_started
        patch.setattr(
            progress.RichListener,
            "arm_started",
            lambda self, name, seed: (start(self, name, seed), setattr(self, "strategy", name)),
        )
        assert main(["train", *flags]) == 130
    said = " ".join(capsys.readouterr().out.split())
    assert "--resume" in said
    assert len(list(read_records(tmp_path / "run" / "abr" / "seed0" / "batches.jsonl", BatchRecord))) == 2
    kept = (tmp_path / "run" / "baseline" / "seed0" / "result.json").stat().st_mtime_ns

    assert main(["train", *flags]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0  # no other flag is needed
    assert "finished before, kept" in capsys.readouterr().out
    assert main(["train", "--resume", "--save_dir", str(tmp_path)]) == 0  # the newest run
    assert (tmp_path / "run" / "baseline" / "seed0" / "result.json").stat().st_mtime_ns == kept
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))) == 2

    assert main(["train", *flags, "--resume", "--lr", "0.5"]) == 2
    assert "--lr was 0.01, now 0.5" in " ".join(capsys.readouterr().err.split())
    assert main(["train", *flags, "--overwrite"]) == 0
    assert (tmp_path / "run" / "baseline" / "seed0" / "result.json").stat().st_mtime_ns != kept


def test_saved_configuration_runs_again(tiny, tmp_path, capsys):
    first = run_bench(make_config(**tiny, strategies=["baseline"], save_dir=tmp_path, run_name="one"))
    assert main(["train", "--config", str(first / "config.yaml"), "--run_name", "two"]) == 0
    one, two = (read_config(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert "Next: iterbatch generate" in capsys.readouterr().out


def test_folders_that_are_in_the_way(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    for flags, message in (
        ({"run_name": "mine"}, "exists already"),
        ({"run_name": "mine", "overwrite": True}, "not the folder of a run"),
        ({"run_name": "new", "resume": LAST}, "no run to resume"),
    ):
        with pytest.raises(RunError, match=message):
            run_bench(make_config(**tiny, save_dir=tmp_path, **flags))
    with pytest.raises(RunError, match="cannot be written"):
        run_bench(make_config(**tiny, save_dir=tmp_path / "mine" / "thesis.txt"))
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "precious"


def test_generate_continues_a_prompt(tiny, tmp_path, capsys):
    run_dir = run_bench(
        make_config(**tiny, strategies=["baseline", "abr"], save_dir=tmp_path, run_name="run")
    )
    model, _, name = load_trained(run_dir)
    assert name in ("baseline/seed0", "abr/seed0")
    assert not model.training
    outputs = []
    for extra in ([], [], ["--sampling_seed", "1"], ["--greedy"]):
        assert (
            main(["generate", str(run_dir), "--prompt", "The with statement", "--new_tokens", "12", *extra])
            == 0
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert all(output.startswith("The with statement") for output in outputs)
    for bad, message in (
        ([str(run_dir), "--prompt", ""], "the prompt has 0 tokens"),
        ([str(run_dir), "--prompt", "word " * 300], "it must have 1 to"),
        ([str(run_dir), "--prompt", "x", "--strategy", "window"], "no finished arm of strategy 'window'"),
        ([str(tmp_path / "none"), "--prompt", "x"], "not the folder of a run"),
        ([str(run_dir), "--prompt", "x", "--temperature", "0"], "--temperature is 0.0"),
    ):
        assert main(["generate", *bad]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_an_arm_whose_losses_are_not_finite_stops_and_the_others_go_on(tiny, tmp_path, monkeypatch):
    real = CutModel.forward

    def broken(model, hidden, micro):
        nats = real(model, hidden, micro)
        return nats * float("nan") if model.training and broken.active else nats

    class Watching(Listener):
        def arm_started(self, strategy, seed):
            broken.active = strategy == "baseline"

    broken.active = False
    monkeypatch.setattr(CutModel, "forward", broken)
    run_dir = run_bench(
        make_config(**tiny, strategies=["baseline", "abr"], batch_size=1, save_dir=tmp_path, run_name="run"),
        Watching(),
    )
    rows = {
        row["strategy"]: row for row in json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    }
    assert "10 batches in a row" in rows["baseline"]["stopped"]
    assert (
        rows["baseline"]["batches"],
        rows["baseline"]["updates"],
        rows["baseline"]["skipped_updates"],
    ) == (10, 0, 10)
    assert rows["baseline"]["val_ppl"] == pytest.approx(rows["baseline"]["base_val_ppl"])
    assert rows["abr"]["stopped"] is None
    assert "stopped early" in (run_dir / "summary.md").read_text(encoding="utf-8")
    assert (run_dir / "baseline" / "seed0" / "adapter" / "adapter_model.safetensors").exists()


def test_text_from_data_is_inert_in_samples(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    nasty = "<script>alert(1)</script> # heading\n**bold** \x1b[31mred\x1b[0m "
    data.write_text(
        "".join(json.dumps({"text": nasty * 8 + str(number)}) + "\n" for number in range(20)),
        encoding="utf-8",
    )
    run_dir = run_bench(
        make_config(**tiny, strategies=["baseline"], data_dir=data, save_dir=tmp_path, run_name="run")
    )
    page = (run_dir / "baseline" / "seed0" / "samples.md").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert all(
        line.startswith("    ") for line in page.splitlines() if "<script>" in line or "**bold**" in line
    )


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_quantised_bases_train_alike_whatever_came_before_and_is_reused(tmp_path, load_in):
    pytest.importorskip("bitsandbytes", reason='pip install "iterbatch[quant]"')
    flags = {
        "load_in": load_in,
        "lora_layers": "top:4",
        "max_train_tokens": 4096,
        "max_eval_tokens": 1000,
        "log_with": ["none"],
    }
    results = {}
    for name, reuse, strategies in (("alone", "off", ["abr"]), ("second", "batch", ["baseline", "abr"])):
        run = run_bench(
            make_config(**flags, reuse=reuse, strategies=strategies, save_dir=tmp_path, run_name=name)
        )
        results[name] = json.loads((run / "abr/seed0/result.json").read_text(encoding="utf-8"))["val_ppl"]
    assert results["alone"] == pytest.approx(results["second"], rel=1e-6)
