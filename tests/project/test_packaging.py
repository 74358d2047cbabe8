"""Files that must agree with each other, and rules that hold over the whole source."""

import ast
import importlib
import re
import tomllib

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from iterbatch.config import ASSETS
from iterbatch.plain_yaml import read_yaml

SOURCES = sorted((ROOT / "iterbatch").rglob("*.py"))


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_every_dependency_has_a_pin_inside_its_range():
    from packaging.requirements import Requirement

    project, pins = _project(), _pins()
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["test"], *extras["full"]]:
        requirement = Requirement(text)
        if requirement.name == "iterbatch":
            continue
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_conda_environment_installs_this_package_with_its_pins():
    environment = read_yaml(ROOT / "environment.yml")
    assert environment["name"] == "abr-text-generation"
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{_project()['requires-python']}", "pip"]
    assert pip == {"pip": ["-c constraints.txt", "-e ."]}


def test_bundled_base_is_small_and_plain():
    files = {file.name for file in ASSETS.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    } <= files
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) <= 12e6
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    assert 3e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 5e6
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (8, 4096)


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_commands(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for command in (
        "pip install -c constraints.txt -e . && python train.py",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ):
        assert f"\n{command}\n" in text
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_readmes_are_kept_in_step():
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
    )

    def skeleton(text):
        return [re.match(r"#+", line).group() for line in text.splitlines() if re.match(r"#+ ", line)]

    def blocks(text):  # without comments, which are translated
        return [
            re.sub(r"#.*|\s+", "", block)
            for block in re.findall(r"```(?:bash|text|python)\n(.*?)```", text, flags=re.DOTALL)
        ]

    assert skeleton(english) == skeleton(chinese)
    assert len(blocks(english)) == len(blocks(chinese))
    assert [
        one
        for one, two in zip(blocks(english), blocks(chinese), strict=True)
        if one != two and "iterbatch/" not in one
    ] == []


def test_readme_strategy_in_ten_lines_works():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        if "BaseTrainingStrategy" in block
    )
    space = {}
    exec(code, space)
    assert [space["TwiceWhenHard"](cut=3.0).repeats(loss) for loss in (2.9, 3.1)] == [1, 2]
    assert len(code.splitlines()) <= 15


def test_nothing_is_unpickled_and_printing_stays_at_the_command_line():
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        assert not imports & {"pickle", "dill", "joblib", "shelve", "marshal"}, file
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if call.startswith(("torch.load(", "print("))], file
        for call in calls:
            if call.startswith(("np.load(", "numpy.load(")):
                assert "allow_pickle=False" in call


def test_strategies_are_not_named_in_the_loop():
    for file in (ROOT / "iterbatch" / "training").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert not re.search(r"[\"'](baseline|abr|learnable|window)[\"']", source)


def test_packed_records_are_laid_out_again_and_name_no_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    records = importlib.import_module("records")
    monkeypatch.setenv("ITERBATCH_DATA", str(tmp_path / "data"))
    run_dir = tmp_path / "results" / "study"
    (run_dir / "abr/seed0").mkdir(parents=True)
    (run_dir / "study.json").write_text(
        f'{{"data_dir": "{tmp_path}/data/casino", "save_dir": "{tmp_path}/results"}}', encoding="utf-8"
    )
    (run_dir / "abr/seed0/result.json").write_text('{"naïve": 1}\n', encoding="utf-8", newline="")
    (run_dir / "abr/seed0/adapter.safetensors").write_bytes(b"\0")
    assert records.pack(run_dir, tmp_path / "study.parquet") == 2
    monkeypatch.setenv("ITERBATCH_DATA", "/elsewhere")
    assert records.unpack(tmp_path / "study.parquet", tmp_path / "again") == 2
    assert (tmp_path / "again/study.json").read_text(
        encoding="utf-8"
    ) == '{"data_dir": "/elsewhere/casino", "save_dir": "results"}'
    assert (tmp_path / "again/abr/seed0/result.json").read_bytes() == (
        run_dir / "abr/seed0/result.json"
    ).read_bytes()
    with pytest.raises(SystemExit, match="exists already"):
        records.unpack(tmp_path / "study.parquet", tmp_path / "again")
    monkeypatch.delenv("ITERBATCH_DATA")
    with pytest.raises(SystemExit, match="casino, a folder of this machine; set one of ITERBATCH_DATA"):
        records.pack(run_dir, tmp_path / "study.parquet")
    assert records.unpack(tmp_path / "study.parquet", tmp_path / "third") == 2  # a report needs no text
    assert "${ITERBATCH_DATA}/casino" in (tmp_path / "third/study.json").read_text(encoding="utf-8")
    for file in (ROOT / "studies/records").rglob("*.parquet"):
        texts = pq.read_table(file).column("text").to_pylist()
        assert not re.search(
            r'"?(data_dir|model_name)"?: "?/',
            "\n".join(text for text in texts if text.startswith("{") or "data_dir" in text),
        ), file
