import json

import pytest

from iterbatch.bench.price import Placement, placements, recommend
from iterbatch.cli.main import main
from iterbatch.reuse.store import ActivationStore, Layout, stores_folder


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (2, ["all", "top:1"]),
        (3, ["all", "top:2", "top:1"]),
        (4, ["all", "top:2", "top:1"]),
        (8, ["all", "top:4", "top:2"]),
        (32, ["all", "top:16", "top:8", "top:2"]),
    ],
)
def test_placements(layers, expected):
    assert placements(layers) == expected


@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [([1.0, 0.7, 0.5, 0.3], "top:2"), ([1.0, 0.55, 0.5], "top:1"), ([1.0, 0.9, 0.8], "top:2")],
)
def test_recommends_the_most_layers_with_cheap_repeats_or_the_cheapest(ratios, chosen):
    measured = [
        Placement(f"top:{index}" if index else "all", ratio, ratio, 1, 1, 1, 1, 1, 1, 3)
        for index, ratio in enumerate(ratios)
    ]
    assert recommend(measured)[0].lora_layers == chosen


def test_price_prints_a_table_and_json(tiny, capsys):
    flags = [
        "--model_name",
        tiny["model_name"],
        "--dtype",
        "float32",
        "--max_length",
        "32",
        "--batch_size",
        "2",
        "--seconds",
        "0.1",
    ]
    assert main(["price", *flags]) == 0
    shown = capsys.readouterr().out
    assert "Recommended: --lora_layers " in shown  # which one is for a quiet machine to say
    assert "What repeats were worth" in shown
    assert "too far to say" in " ".join(shown.split())  # 64 tokens a batch
    assert main(["price", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["lora_layers"] for each in report["placements"]] == ["all", "top:1"]
    for each in report["placements"]:
        assert {
            "price_ratio_measured",
            "price_ratio_flops",
            "fresh_ms",
            "repeat_ms",
            "peak_memory_mb",
        } <= each.keys()
        numbers = {name: value for name, value in each.items() if isinstance(value, int | float)}
        assert len(numbers) == len(each) - 2
        assert all(value > 0 for value in numbers.values())
        assert each["measured_elsewhere"]["worth"]["at_once"]["low"] > 0
        assert each["measured_elsewhere"]["too_far"]  # 64 tokens a batch
    assert report["placements"][0]["price_ratio_flops"] == 1.0 > report["placements"][1]["price_ratio_flops"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["price", "--seconds", "0"], "--seconds is 0.0; it must be above 0"),
        (["price", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["price", "--model_name", "./nowhere"], "does not exist"),
        (["price", "--max_length", "100000"], "the model's context is"),
        (["cache", "clear", "nothing"], "names 0 stores"),
        (["train", "--reuse_limit_gb", "0"], "--reuse_limit_gb is 0.0; it must be above 0"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_cache_list_and_clear(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path))
    assert main(["cache", "list"]) == 0
    assert "No activations are kept" in capsys.readouterr().out
    header = {
        "key": {"cut": 6, "dtype": "bfloat16"},
        "model": "[red]\x1b[31mllama",
        "text": "pydocs, train",
        "items": 4,
    }
    ActivationStore(stores_folder() / "abc123", header, Layout([4] * 4, 8, "bfloat16"), pytest.fail).close()
    assert main(["cache", "list"]) == 0
    shown = capsys.readouterr().out
    assert "abc123" in shown
    assert "0 of 4" in shown
    assert "\x1b[31m" not in shown
    assert main(["cache", "clear", "abc"]) == 2  # nobody to ask
    assert "add --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    assert main(["cache", "clear", "abc"]) == 0
    assert "Nothing is deleted" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert main(["cache", "clear", "abc"]) == 0
    assert "1 store(s) deleted" in capsys.readouterr().out
    assert not list(stores_folder().iterdir())
