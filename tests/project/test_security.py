"""Nothing let in: no pickles, no code of others, no live text, no secrets in what a run leaves."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import markdown as to_html
import pytest
from conftest import ROOT
from support.browser import BROWSER, QUIET
from support.records import change_result
from support.runs import flag_words

from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.errors import ConfigError, RunError
from iterbatch.evaluation.trained import load_trained
from iterbatch.report.summary import write
from iterbatch.report.wording import markdown
from iterbatch.study.run import run as run_bench

SOURCES = sorted(
    file for folder in ("iterbatch", "benchmarks", "campaigns") for file in (ROOT / folder).rglob("*.py")
)
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_unpickles_or_evaluates(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not FORBIDDEN & {name.split(".")[0] for name in names}
        if not isinstance(node, ast.Call):
            continue
        called, given = (
            ast.unparse(node.func),
            {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
        )
        assert called not in (
            "eval",
            "exec",
            "torch.load",
            "yaml.load",
            "yaml.unsafe_load",
            "os.system",
            "joblib.load",
        )
        if called in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False"
        if called.endswith("from_pretrained") and "AutoModel" in called:
            assert given.get("use_safetensors") == "True"


WATCHED = """
import sys
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
from iterbatch.cli.main import main
flags = sys.argv[1:]
assert main(["train", *flags]) == 0
run = flags[flags.index("--save_dir") + 1] + "/run"
assert main(["train", "--resume", run, "--strategies", "baseline", "abr"]) == 0
assert main(["generate", run, "--prompt", "The"]) == 0
print("UNPICKLED", found)
"""


@pytest.mark.slow
def test_a_whole_run_unpickles_nothing(tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(f'{{"text": "Document number {n}, with a few words in it."}}\n' for n in range(60)),
        encoding="utf-8",
    )
    flags = [
        "--model_name",
        str(tiny_folder),
        "--data_dir",
        str(data),
        "--max_length",
        "16",
        "--max_eval_tokens",
        "100",
        "--save_dir",
        str(tmp_path),
    ]
    flags += [
        "--run_name",
        "run",
        "--strategies",
        "baseline",
        "--lora_layers",
        "top:1",
        "--reuse",
        "epoch",
        "--checkpoint_every",
        "1u",
    ]
    finished = subprocess.run(
        [sys.executable, "-c", WATCHED, *flags], capture_output=True, text=True, timeout=300, check=False
    )
    assert "UNPICKLED []" in finished.stdout, finished.stdout + finished.stderr
    kinds = {
        file.suffix
        for file in (tmp_path / "run").rglob("*")
        if file.is_file() and "tfevents" not in file.name
    }
    assert kinds <= {
        ".json",
        ".jsonl",
        ".yaml",
        ".yml",
        ".md",
        ".png",
        ".pdf",
        ".html",
        ".csv",
        ".tex",
        ".safetensors",
        "",
    }


# -- code of others ---------------------------------------------------------------------------------- -----


def _model_with_code(tiny_folder, folder, config_changes):
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | config_changes), encoding="utf-8")
    evil = f"from pathlib import Path\nPath({str(folder.parent / 'ran')!r}).touch()\nclass Evil: pass\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(evil, encoding="utf-8")
    return folder


AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", None],
}


@pytest.mark.parametrize(
    "changes", [{"auto_map": AUTO_MAP}, {"auto_map": AUTO_MAP, "model_type": "evil"}], ids=["llama", "evil"]
)
def test_remote_code_does_not_run(tiny_folder, tiny, tmp_path, changes, capsys):
    folder = _model_with_code(tiny_folder, tmp_path / "model", changes)
    words = [
        "--data_dir",
        str(_good(tmp_path)),
        "--max_length",
        "16",
        "--log_with",
        "none",
        "--save_dir",
        str(tmp_path),
        "--run_name",
        "run",
    ]
    code = main(
        [
            "train",
            "--model_name",
            str(folder),
            *words,
            "--strategies",
            "baseline",
            "--max_train_tokens",
            "64",
            "--max_eval_tokens",
            "50",
        ]
    )
    assert code == (2 if "model_type" in changes else 0)
    assert not (tmp_path / "ran").exists()
    capsys.readouterr()


def _good(folder):
    data = folder / "data.jsonl"
    data.write_text(
        "".join(f'{{"text": "Document number {n}, with a few words."}}\n' for n in range(40)),
        encoding="utf-8",
    )
    return data


def test_only_the_command_line_allows_remote_code(tiny, tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text("trust_remote_code: true\n", encoding="utf-8")
    assert main(["train", "--config", str(file), "--dry_run"]) == 2
    assert "said on the command line only" in " ".join(capsys.readouterr().err.split())
    run_dir = run_bench(
        make_config(
            **tiny, strategies=["baseline"], save_dir=tmp_path, run_name="run", trust_remote_code=True
        )
    )
    config = run_dir / "config.yaml"
    assert "trust_remote_code" not in config.read_text(encoding="utf-8")
    config.write_text(config.read_text(encoding="utf-8") + "trust_remote_code: true\n", encoding="utf-8")
    assert main(["train", "--resume", str(run_dir)]) == 2
    assert main(["generate", str(run_dir), "--prompt", "x"]) == 2


def test_pickled_weights_are_not_read(tiny_folder, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"Pickled ones .* are not read"):
        run_bench(make_config(**tiny | {"model_name": str(folder)}, save_dir=tmp_path))
    run_dir = run_bench(make_config(**tiny, strategies=["baseline"], save_dir=tmp_path, run_name="run"))
    adapter = run_dir / "baseline/seed0/adapter"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(RunError, match=r"holds no adapter_model\.safetensors"):
        load_trained(run_dir)


# -- paths ------------------------------------------------------------------------------------------- -----


def test_what_a_result_says_leads_nowhere(tiny, tmp_path):
    run_dir = run_bench(make_config(**tiny, strategies=["baseline"], save_dir=tmp_path, run_name="run"))
    file = run_dir / "baseline/seed0/result.json"
    change_result(file.parent, strategy="../../elsewhere", seed="0/../../x")
    assert load_trained(run_dir)[2] == "baseline/seed0"
    write(run_dir)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


def test_a_link_in_place_of_a_run_is_left_alone(tiny, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.yaml").write_text("thesis", encoding="utf-8")
    (tmp_path / "run").symlink_to(precious)
    with pytest.raises(RunError, match="is not a folder"):
        run_bench(make_config(**tiny, save_dir=tmp_path, run_name="run", overwrite=True))
    assert (precious / "config.yaml").read_text(encoding="utf-8") == "thesis"


def _outside(run_dir, outside):
    """Put the arm's folder elsewhere, as if it had not ended, and a link in its place."""
    arm = run_dir / "baseline/seed0"
    shutil.copytree(arm, outside)
    (outside / "result.json").unlink()
    shutil.rmtree(arm)
    arm.symlink_to(outside)
    return sorted((file.name, file.stat().st_size) for file in outside.rglob("*"))


def test_nothing_is_written_or_deleted_through_a_link(tiny, tmp_path, capsys):
    run_dir = run_bench(make_config(**tiny, strategies=["baseline"], save_dir=tmp_path, run_name="run"))
    before = _outside(run_dir, tmp_path / "thesis")
    flags = flag_words(tiny | {"save_dir": tmp_path, "run_name": "run", "strategies": "baseline"})
    study = ["--save_dir", str(tmp_path), "--run_name", "run"]
    for words in (
        ["train", "--resume", str(run_dir)],
        ["train", *flags, "--overwrite"],
        ["report", str(run_dir)],
        ["compare", *flag_words(tiny), *study, "--strategies", "baseline", "--overwrite"],
    ):
        assert main(words) == 2, words
        assert "seed0 is a link, and nothing is written through one" in " ".join(
            capsys.readouterr().err.split()
        )
        assert sorted((file.name, file.stat().st_size) for file in (tmp_path / "thesis").rglob("*")) == before
    (run_dir / "baseline/seed0").unlink()
    (run_dir / "lock").unlink(missing_ok=True)
    (run_dir / "lock").symlink_to(tmp_path / "thesis/batches.jsonl")  # a lock is written when it is taken
    assert main(["train", "--resume", str(run_dir)]) == 2
    assert sorted((file.name, file.stat().st_size) for file in (tmp_path / "thesis").rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_among_the_records_keeps_nobody_waiting(tiny, tmp_path, capsys):
    run_dir = run_bench(make_config(**tiny, strategies=["baseline"], save_dir=tmp_path, run_name="run"))
    os.mkfifo(run_dir / "baseline/seed0/notes.json")
    assert main(["report", str(run_dir)]) == 2
    assert "notes.json is neither a file nor a folder" in " ".join(capsys.readouterr().err.split())


# -- bounds ------------------------------------------------------------------------------------------------

ALIASES = "".join(
    f"{name}: &{name} [{', '.join(['*' + before if before else 'x'] * 9)}]\n"
    for name, before in zip("abcdefgh", ["", *"abcdefg"], strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES + "tune: {low: *h}\n", "more than 100,000 values, with its aliases written out"),
        ("a: &a [*a]\n", "more than 100,000 values"),
        ("about: " + "x" * (10 << 20), "more than 1,048,576 characters"),
        ("about: " + "[" * 100_000, "is not valid YAML"),
    ],
    ids=["aliases", "within itself", "10 MB", "deep"],
)
def test_yaml_that_grows_is_refused(tmp_path, capsys, text, message):
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    for words in (["compare", str(file)], ["train", "--config", str(file)]):
        assert main(words) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_no_input(tmp_path, capsys, tiny_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").unlink()
    for name in ("model/config.json", "study.yaml", "text.jsonl"):
        os.mkfifo(tmp_path / name)
    for words in (
        ["compare", str(tmp_path / "study.yaml")],
        ["train", "--config", str(tmp_path / "study.yaml")],
        ["train", "--config", os.devnull],
        ["train", "--data_dir", str(tmp_path / "text.jsonl")],
        ["train", "--model_name", str(folder)],
    ):
        assert main(words) == 2, words
        assert "error:" in capsys.readouterr().err


def test_a_header_of_weights_is_not_read_whatever_its_length(tmp_path, capsys, tiny_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    with (folder / "model.safetensors").open("wb") as weights:
        weights.write((99_000_000).to_bytes(8, "little"))
        weights.truncate(99_000_100)
    assert main(["train", "--model_name", str(folder)]) == 2
    assert "has a header of 99,000,000 bytes" in " ".join(capsys.readouterr().err.split())


# -- text -------------------------------------------------------------------------------------------- -----

CHANGE = "document.title='changed'"
NASTY = f'</title></pre><script>{CHANGE}</script><img src=x onerror="{CHANGE}"> '
NASTY += "[a](javascript:alert(1)) **b** | c \x1b[31m"


def test_names_are_inert_in_markdown_and_html():
    page = to_html.markdown(
        f"# {markdown(NASTY)}\n\n| a |\n| --- |\n| {markdown(NASTY)} |\n", extensions=["tables"]
    )
    assert "<script" not in page
    assert "<img" not in page
    assert "<a " not in page
    assert "<strong>" not in page
    assert "\x1b" not in page
    assert page.count("<td") == 1


@pytest.fixture(scope="module")
def nasty_run(tmp_path_factory, tiny_folder):
    """A run on a text that tries everything, in a folder and with a result of nasty names."""
    folder = tmp_path_factory.mktemp("nasty")
    data = folder / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{NASTY} {n}\n# heading\n```\n{NASTY}"}) + "\n" for n in range(40)),
        encoding="utf-8",
    )
    flags = {
        "model_name": str(tiny_folder),
        "dtype": "float32",
        "max_length": 64,
        "max_train_tokens": 512,
        "max_eval_tokens": 400,
        "epochs": 1,
    }
    run_dir = run_bench(
        make_config(**flags, data_dir=data, strategies=["baseline"], save_dir=folder, run_name="run")
    )
    renamed = folder / NASTY.replace("/", "")[:120]
    run_dir.rename(renamed)
    (renamed / "baseline").rename(renamed / "<img src=x onerror=document.title='changed'>|**b**")
    write(renamed)
    return renamed


def test_nothing_a_run_writes_is_live(nasty_run, capsys):
    for file in nasty_run.rglob("*.md"):
        text = file.read_text(encoding="utf-8")
        assert "\x1b" not in text
        page = to_html.markdown(text, extensions=["tables"])
        assert "<script" not in page
        assert "<img src=x" not in page
    assert main(["generate", str(nasty_run), "--prompt", f"{NASTY}", "--new_tokens", "5"]) == 0
    assert main(["train", "--resume", str(nasty_run), "--strategies", "baseline"]) in (0, 2)
    streams = capsys.readouterr()
    assert "\x1b[31m" not in streams.out + streams.err


def test_tensorboard_gets_plain_tags(nasty_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(nasty_run.rglob("*tfevents*")).parent)).Reload()
    tags = events.Tags()
    assert tags["scalars"]
    assert all(re.fullmatch(r"[a-z_/ ]+", tag) for tag in tags["scalars"])
    assert tags["tensors"] == ["settings/text_summary"]  # no text of the data among them


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Debian's chromium")
def test_pages_stay_as_they_are_in_a_browser(nasty_run, tmp_path):
    pages = [
        to_html.markdown(file.read_text(encoding="utf-8"), extensions=["tables"])
        for file in nasty_run.rglob("*.md")
    ]
    for live, body in ((False, "\n".join(pages)), (True, NASTY)):
        page = tmp_path / "page.html"
        page.write_text(
            f"<!doctype html><meta charset=utf-8><title>unchanged</title>{body}", encoding="utf-8"
        )
        command = [
            BROWSER,
            *QUIET,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
        assert ("<title>changed" in shown) == live  # the script would have changed the page, had it run


# -- secrets ----------------------------------------------------------------------------------------- -----


@pytest.mark.slow
def test_no_token_is_left_anywhere(tiny, tmp_path):
    secrets = {
        name: f"secret-{number}-abcdef"
        for number, name in enumerate(
            ("HF_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD")
        )
    }
    words = [word for name, value in tiny.items() if name != "log_with" for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *words,
        "--strategies",
        "baseline",
        "--save_dir",
        str(tmp_path),
        "--run_name",
        "run",
    ]
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | secrets,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    left = (
        b"".join(Path(file).read_bytes() for file in tmp_path.rglob("*") if file.is_file())
        + (finished.stdout + finished.stderr).encode()
    )
    assert b"secret-" not in left
