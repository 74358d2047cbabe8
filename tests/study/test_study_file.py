"""Study files: what they may say, and what is said about one that is wrong."""

from textwrap import dedent

import pytest

from iterbatch.cli.main import main
from iterbatch.errors import ConfigError
from iterbatch.study.study_file import load_study, study_of_flags
from iterbatch.study.study_folder import as_json, from_folder

GOOD = """\
about: A study.
settings:
  dataset: wikitext
  data_dir: ${PLACE}
  max_train_tokens: 512
  match: flops
arms:
  baseline:
  abr: {loss_threshold: 1.5, lr: 1e-3}
  twice: {strategy: fixed, max_repeats: 2}
  permuted: {source: abr}
tune: {trials: 2, low: 1e-4, high: 1e-2, arms: [baseline, abr]}
cells:
  small: {batch_size: 2}
  large: {batch_size: 8, arms: {abr: {lr: 2e-3}}}
environment: [PLACE, PLCAE]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "wiki.train.tokens").write_text(" = A = \n\n Some text . \n", encoding="utf-8")

    def write(text):
        file = tmp_path / "study.yaml"
        file.write_text(dedent(text), encoding="utf-8")
        return file

    return write


def test_a_study_is_read_whole(write):
    study = load_study(write(GOOD))
    small, large = study.cells
    assert (small.name, small.config.training.batch_size, large.config.training.batch_size) == ("small", 2, 8)
    assert [(arm.name, arm.strategy, arm.source) for arm in small.arms] == [
        ("baseline", "baseline", None),
        ("abr", "abr", None),
        ("twice", "fixed", None),
        ("permuted", "permuted", "abr"),
    ]
    assert small.arms[1].config.strategy.knobs["loss_threshold"] == 1.5
    assert (small.arms[1].config.training.lr, large.arms[1].config.training.lr) == (
        1e-3,
        2e-3,
    )  # a cell's own word counts
    assert small.arms[2].config.strategy.knobs["max_repeats"] == 2
    assert small.config.training.match == "flops"
    assert (small.config.training.seeds, small.config.training.prompts) == (
        (0, 1, 2),
        200,
    )  # where a comparison differs from a run
    assert (study.tune["trials"], study.tune["low"], study.tune["arms"]) == (2, 1e-4, ["baseline", "abr"])


def test_flags_override_the_file(write):
    study = load_study(write(GOOD), ["--seeds", "7", "8", "--match", "updates"])
    assert all(
        cell.config.training.seeds == (7, 8) and cell.config.training.match == "updates"
        for cell in study.cells
    )


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        (
            "data_dir: ${HF_TOKEN}/x",
            "",
            "data_dir names ${HF_TOKEN}; a study may use variables whose names begin",
        ),
        (
            "dataset: ${HF_TOKEN}",
            "",
            "dataset names ${HF_TOKEN}; variables stand in data_dir and model_name only",
        ),
        ("run_name: ${ITERBATCH_X}", "", "unknown setting 'run_name'"),
        ("lora_layers: ${ITERBATCH_X}", "", "lora_layers names ${ITERBATCH_X}; variables stand in"),
        ("data_dir: ${HF_TOKEN}/x", "environment: [HF_TOKEN]", "HF_TOKEN, which looks like a secret"),
        ("data_dir: ${CORPORA}/x", "environment: [1]", "write a list of variables' names"),
        ("data_dir: ${CORPORA_2}/x", "environment: [CORPORA_2]", "the environment has no CORPORA_2"),
    ],
)
def test_variables_stand_for_places_and_for_nothing_else(
    tmp_path, monkeypatch, settings, environment, message
):
    for name in ("HF_TOKEN", "ITERBATCH_X", "CORPORA"):
        monkeypatch.setenv(name, "hf_secret")
    file = tmp_path / "study.yaml"
    file.write_text(f"{environment}\nsettings:\n  {settings}\narms: {{baseline: }}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    assert message in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_declared_variables_are_places(tmp_path, monkeypatch):
    monkeypatch.setenv("CORPORA", str(tmp_path))
    monkeypatch.setenv("ITERBATCH_DATA", str(tmp_path))
    for name in ("CORPORA", "ITERBATCH_DATA"):
        file = tmp_path / "study.yaml"
        text = f"environment: [CORPORA]\nsettings: {{data_dir: '${{{name}}}/x'}}\narms: {{baseline: }}\n"
        file.write_text(text, encoding="utf-8")
        assert load_study(file).cells[0].config.data.data_dir == tmp_path / "x"


def test_a_study_survives_its_folder(write, tmp_path):
    from iterbatch.records.write import write_json

    study = load_study(write(GOOD))
    write_json(tmp_path / "study.json", as_json(study))
    again = from_folder(tmp_path)
    assert as_json(again) == as_json(study)
    (tmp_path / "study.json").write_text('{"name": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is damaged"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("abr: {loss", "abrr: {loss", ["line 9", "unknown strategy 'abrr'", "did you mean 'abr'"]),
        (
            "loss_threshold: 1.5",
            "loss_treshold: 1.5",
            ["line 9", "unknown setting of an arm 'loss_treshold'", "did you mean 'loss_threshold'"],
        ),
        ("match: flops", "match: flop", ["line 6", "unknown unit 'flop'", "did you mean 'flops'"]),
        (
            "max_train_tokens",
            "max_train_tokns",
            ["line 5", "unknown setting 'max_train_tokns'", "did you mean 'max_train_tokens'"],
        ),
        ("about:", "abuot:", ["line 1", "unknown section 'abuot'", "did you mean 'about'"]),
        (
            "source: abr",
            "source: twicee",
            ["line 11", "made from arm 'twicee'", "set source to one of baseline, abr, twice"],
        ),
        ("  permuted", "  abr", ["line 11", "'abr' is there twice"]),
        ("  baseline:\n", "", ["no arm is called 'baseline'"]),
        ("{abr: {lr", "{abrr: {lr", ["line 15", "unknown arm 'abrr'", "did you mean 'abr'"]),
        (
            "batch_size: 2",
            "batch_sizes: 2",
            ["line 14", "unknown setting 'batch_sizes'", "did you mean 'batch_size'"],
        ),
        ("small:", "../small:", ["line 14", "cannot be a folder's name"]),
        ("trials: 2", "trials: none", ["line 12", "trials is 'none'"]),
        ("trials: 2", "trails: 2", ["line 12", "unknown setting of tune 'trails'", "did you mean 'trials'"]),
        ("low: 1e-4", "low: 1e-1", ["line 12", "must be below high"]),
        (
            "arms: [baseline, abr]",
            "arms: [baseline, arb]",
            ["line 12", "unknown arm 'arb' to tune", "did you mean 'abr'"],
        ),
        ("batch_size: 2", "batch_size: -2", ["line 14", "--batch_size is -2"]),
        ("loss_threshold: 1.5", "loss_threshold: q1.5", ["line 9", "--loss_threshold is 'q1.5'"]),
        ("loss_threshold: 1.5", "gap: 0", ["line 9", "--gap is 0; it must be at least 1"]),
        ("loss_threshold: 1.5", "probe_rate: 0.1", ["line 9", "sets probe_rate, which abr has not"]),
        (
            "  baseline:\n",
            "  baseline: {placement: spaced}\n",
            ["line 8", "sets placement, which baseline has not; its own knobs: none"],
        ),
        ("trials: 2", "seeds: 0, trials: 2", ["line 12", "seeds is 0"]),
        ("about: A study.", "about: A study.\nworth: [0.5, 1]", ["line 2", "worth holds 1"]),
        ("max_repeats: 2", "max_repeats: -2", ["line 10", "--max_repeats is -2"]),
        ("${PLACE}", "${PLCAE}", ["the environment has no PLCAE"]),
        ("arms:\n  baseline", "arms: 3\nold:\n  baseline", ["holds a int"]),
        ("about: A study.", "about: [", ["is not valid YAML"]),
        (
            "{abr: {lr: 2e-3}}",
            "{abr: {strategy: abrr}}",
            ["line 15", "unknown strategy 'abrr'", "did you mean 'abr'"],
        ),
        (
            "{abr: {lr: 2e-3}}",
            "{permuted: {source: permuted}}",
            ["line 15", "made from arm 'permuted', which is not above it"],
        ),
        (
            "  baseline:\n",
            "  baseline: {strategy: fixed}\n",
            ["line 8", "arm 'baseline' has the strategy 'fixed'"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_would_be_right(write, capsys, old, new, expected):
    assert old in GOOD
    file = write(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as raised:
        load_study(file)
    for part in expected:
        assert part in str(raised.value)
    assert main(["compare", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_all_mistakes_are_told_at_once(write):
    with pytest.raises(ConfigError) as raised:
        load_study(
            write(
                GOOD.replace("abr: {loss", "abrr: {loss")
                .replace("match: flops", "match: hours")
                .replace("about:", "abuot:")
            )
        )
    assert str(raised.value).count("study.yaml, line") >= 3


def test_a_study_is_found_however_it_is_written(write, tmp_path, monkeypatch, capsys):
    write(GOOD)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "./study.yaml", "--workers", "2", "--dry_run"]) == 2
    assert "too few to hold out validation and test" in " ".join(
        capsys.readouterr().err.split()
    )  # it was read, down to its text


def test_a_study_that_is_not_there(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_comparison_of_flags_needs_a_baseline_and_sources():
    with pytest.raises(ConfigError, match="lacks 'baseline'"):
        study_of_flags(["--strategies", "abr"])
    with pytest.raises(ConfigError, match="'permuted' is made from 'abr'"):
        study_of_flags(["--strategies", "baseline", "permuted"])
    study = study_of_flags(["--strategies", "baseline", "abr", "permuted", "--seeds", "0"])
    assert [arm.name for arm in study.cells[0].arms] == ["baseline", "abr", "permuted"]
    assert study.cells[0].config.training.match == "flops"
