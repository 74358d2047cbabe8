import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from support.commands import ORIGINAL

from iterbatch.checks import make_config, settings
from iterbatch.cli.main import main
from iterbatch.config import DEFAULT_TOKENS
from iterbatch.errors import ConfigError
from iterbatch.flags import parse_config
from iterbatch.plain_yaml import dump_yaml, parse_yaml


@pytest.mark.parametrize("command", ORIGINAL)
def test_original_commands_parse(command):
    config = parse_config(shlex.split(command))
    assert config.model.model_name == "huggyllama/llama-7b"
    assert (config.training.epochs, config.training.batch_size, config.max_length, config.lr) == (
        3,
        4,
        512,
        2e-4,
    )
    assert config.strategy.knobs["loss_threshold"] == 2.0


def test_without_a_hub_the_original_command_stops_at_once_and_says_what_to_do(tmp_path, capsys):
    start = time.monotonic()
    code = main(["train", *shlex.split(ORIGINAL[-1]), "--save_dir", str(tmp_path / "results")])
    message = " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert time.monotonic() - start < 20
    for part in (
        "'huggyllama/llama-7b' could not be reached",
        "'Salesforce/wikitext' could not be read",
        "--model_name",
        "--data_dir",
    ):
        assert part in message
    assert not any((tmp_path / "results").iterdir())


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--strategies baseline abl", ["unknown strategy 'abl'", "did you mean 'abr'"]),
        ("--dataset wikitxt", ["unknown dataset 'wikitxt'", "did you mean 'wikitext'"]),
        ("--loss_threshold 0", ["--loss_threshold is 0.0", "above 0"]),
        ("--loss_threshold nan", ["--loss_threshold is nan"]),
        ("--max_repeats 0", ["--max_repeats is 0", "at least 1"]),
        ("--window_size 1", ["--window_size is 1", "at least 2"]),
        ("--epochs 0 --batch_size 0", ["--epochs is 0", "--batch_size is 0"]),
        ("--lora_layers bottom", ["--lora_layers is 'bottom'"]),
        ("--lora_layers top:9", ["the model has 8 layers", "top:1 to top:8"]),
        ("--lora_layers 3-8", ["the model has 8 layers"]),
        ("--max_length 512", ["the model's context is 256"]),
        ("--max_train_tokens 100", ["at least one block of --max_length 256"]),
        ("--lr -1", ["--lr is -1.0"]),
        ("--seeds 0 0", ["names one twice"]),
        ("--seeds -1", ["--seeds is -1; it must be at least 0"]),
        ("--probe_rate 2", ["at least 0 and at most 1"]),
        ("--lora_targets qproj", ["unknown --lora_targets 'qproj'", "did you mean 'q_proj'"]),
        ("--run_name ../up", ["plain folder name"]),
        ("--resume", ["there is no run in", "to resume"]),
        ("--resume nowhere", ["there is no run to resume at", "nowhere"]),
        ("--resume --run_name none", ["there is no run to resume at", "none"]),
        ("--checkpoint_every 5m", ["--checkpoint_every is '5m'", "60s or 500u"]),
        ("--explosion 0", ["--explosion is 0.0", "above 0"]),
        ("--log_with tensorbord", ["did you mean 'tensorboard'"]),
        ("--log_with clearml", ["needs its package"]),
        ("--load_in 4bit", ["needs bitsandbytes", "iterbatch[quant]"]),
        ("--config missing.yaml", ["cannot be read"]),
        ("--data_dir nowhere", ["does not exist"]),
        ("--model_name ./nowhere", ["does not exist", "--model_name"]),
    ],
)
def test_bad_flags(flags, parts, capsys, tmp_path):
    assert main(["train", *flags.split(), "--save_dir", str(tmp_path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert len(message) < 1500


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "--stratgies", "abr"], "--strategies"),
        (["train", "--epochs", "three"], "three"),
        (["train", "--load_in", "3bit"], "3bit"),
        (["generate"], "run"),
    ],
)
def test_flags_that_do_not_parse(arguments, part, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert part in captured.err + captured.out


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_while_the_command_line_is_read_ends_without_a_traceback(monkeypatch, capsys):
    def pressed(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("tyro.cli", pressed)
    assert main(["train", "--dry_run"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_all_problems_are_reported_together(capsys):
    assert (
        main(["train", "--epochs", "0", "--loss_threshold", "-1", "--strategies", "x", "--lora_rank", "0"])
        == 2
    )
    message = capsys.readouterr().err
    assert all(
        part in message for part in ("--epochs", "--loss_threshold", "unknown strategy", "--lora_rank")
    )


def test_help_groups_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in settings())
    assert all(f"{group} options" in text for group in ("model", "data", "training", "strategy", "run"))


def test_yaml_sets_any_flag_and_flags_override_it(tmp_path):
    file = tmp_path / "c.yaml"
    content = "epochs: 7\nstrategies: [abr, window]\ngradient_checkpointing: true\n"
    content += "lr: 1e-3\ndata_dir: null\nseeds: [1, 2]\n"
    file.write_text(content, encoding="utf-8")
    config = parse_config(["--config", str(file), "--epochs", "2"])
    assert config.training.epochs == 2
    assert config.strategy.strategies == ("abr", "window")
    assert config.model.gradient_checkpointing is True
    assert (config.lr, config.data.data_dir, config.training.seeds) == (1e-3, None, (1, 2))


def test_resolved_configuration_can_be_fed_back(tmp_path):
    config = make_config(
        epochs=3, strategies=["abr"], lora_layers="top:2", max_train_tokens=4096, data_dir=tmp_path
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config.flat()), encoding="utf-8")
    assert parse_config(["--config", str(file)]).flat() == config.flat()
    assert parse_yaml(dump_yaml(config.flat()))["lr"] == 5e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: [1", "not valid YAML"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"epoch: 3\n", "unknown setting 'epoch'.*did you mean 'epochs'"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"", "holds a NoneType"),
    ],
)
def test_bad_yaml(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        parse_config(["--config", str(file)])


def test_make_config_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        make_config(epoch=3)
    assert make_config(epochs=1) == make_config()


def test_only_the_bundled_text_under_the_bundled_model_is_cut_short():
    assert make_config().max_train_tokens == make_config().flat()["max_train_tokens"] == DEFAULT_TOKENS
    assert make_config(max_train_tokens=100_000).max_train_tokens == 100_000
    for other in ({"dataset": "dialogue"}, {"data_dir": "mine"}, {"model_name": "owner/name"}):
        assert make_config(**other).max_train_tokens is None


def test_dry_run_plans_and_trains_nothing(tmp_path, capsys):
    assert (
        main(
            [
                "train",
                "--dry_run",
                "--epochs",
                "2",
                "--grad_accum",
                "2",
                "--save_dir",
                str(tmp_path / "r"),
                "--lora_layers",
                "top:2",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert all(
        part in text for part in ("batches", "updates", "tokens", "GFLOPs", "memory", "lora_layers: top:2")
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_module_and_shim_are_the_same_command():
    for command in (["-m", "iterbatch", "train"], ["train.py"]):
        done = subprocess.run(
            [sys.executable, *command, "--epochs", "0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 2
        assert "--epochs is 0; it must be at least 1" in done.stderr
    assert (
        "usage"
        in subprocess.run(
            [sys.executable, "-m", "iterbatch"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=60,
        ).stdout
    )


# -- model folders ----------------------------------------------------------------------------------- -----


@pytest.fixture
def broken_folder(tiny_folder, tmp_path):
    import shutil

    return shutil.copytree(tiny_folder, tmp_path / "model")


def _no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _other_architecture(folder):
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(
        text.replace('"model_type": "llama"', '"model_type": "gpt2"'), encoding="utf-8"
    )


def _truncated(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _more_layers(folder):
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(
        text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'), encoding="utf-8"
    )


def _wider(folder):
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(
        text.replace('"intermediate_size": 64', '"intermediate_size": 96'), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no usable config.json"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "no usable config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (_no_tokenizer, "tokenizer"),
        (_other_architecture, "is a 'gpt2' model"),
        (_truncated, "weights .* cannot be read"),
        (_more_layers, "they have . layers, not"),
        (_wider, "weights of"),
    ],
    ids=[
        "no config",
        "broken config",
        "no weights",
        "no tokenizer",
        "other architecture",
        "truncated",
        "more layers",
        "wider",
    ],
)
def test_broken_model_folders(broken_folder, damage, message, tmp_path, capsys):
    import re

    damage(broken_folder)
    code = main(
        [
            "train",
            "--model_name",
            str(broken_folder),
            "--max_length",
            "32",
            "--save_dir",
            str(tmp_path / "r"),
            "--max_train_tokens",
            "64",
        ]
    )
    error = " ".join(capsys.readouterr().err.split())
    assert code == 2, error
    assert re.search(message, error)
    assert "Point --model_name at a local folder" in error or "this experiment adapts" in error
    assert list((tmp_path / "r").iterdir()) == []  # nothing half-made is left
