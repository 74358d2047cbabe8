"""Learning rates: as many trials for every arm, at the same values, resumed where they stopped."""

import json
import math

import pytest
from support.studies import study_file

from iterbatch.cli.main import main
from iterbatch.errors import ConfigError
from iterbatch.records.result import read_result
from iterbatch.study.study_file import load_study
from iterbatch.study.tune import tune, values


def test_values_cover_the_range_evenly_on_a_log_scale():
    found = values(1e-4, 1e-1, 6, seed=3)
    places = sorted((math.log10(value) + 4) / 3 for value in found)
    assert [int(place * 6) for place in places] == list(range(6))
    assert found != sorted(found)
    assert found == values(1e-4, 1e-1, 6, seed=3) != values(1e-4, 1e-1, 6, seed=4)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder):
    """A study of three arms, one made from another, after tuning; and what was said."""
    folder = tmp_path_factory.mktemp("tune")
    arms = {"baseline": None, "abr": {"loss_threshold": 2.75}, "permuted": {"source": "abr"}}
    file = study_file(folder, tiny_folder, arms, max_train_tokens=512)
    text = (
        file.read_text(encoding="utf-8")
        + "tune: {trials: 2, low: 1e-3, high: 1e-1}  # a comment that stays\n"
    )
    file.write_text(text, encoding="utf-8")
    said = []
    return folder, file, tune(file, folder, 1, said.append), said


def test_every_arm_gets_the_same_trials_and_its_best_is_written(tuned):
    folder, file, chosen, said = tuned
    scores = json.loads((folder / "study-tune/tuning.json").read_text(encoding="utf-8"))[""]
    rates = [[rate for rate, _ in scores[arm]] for arm in ("baseline", "abr", "permuted")]
    assert rates[0] == rates[1] == rates[2] == values(1e-3, 1e-1, 2, seed=1000)
    for arm, trials in scores.items():
        best = min(trials, key=lambda trial: trial[1])
        assert chosen[""][arm] == best[0]
        number = trials.index(best)
        result = read_result(folder / f"study-tune/trials/{arm}.{number}/seed1000")
        assert best[1] == pytest.approx(math.log(result.val_ppl))
    assert "# a comment that stays" in file.read_text(encoding="utf-8")
    study = load_study(file)
    assert {arm.name: arm.config.training.lr for arm in study.cells[0].arms} == chosen[""]
    page = (folder / "study-tune/tuning.md").read_text(encoding="utf-8")
    assert "best of 2" in page
    assert "(edge)" in page  # of two trials both are
    assert any("At the edge of the range" in text for text in said)


def test_tuning_goes_on_where_it_stopped(tuned):
    folder, file, chosen, _ = tuned
    trained = {each: each.stat().st_mtime_ns for each in folder.rglob("result.json")}
    assert len(trained) == 6
    said = []
    assert tune(file, folder, 1, said.append) == chosen
    assert {each: each.stat().st_mtime_ns for each in folder.rglob("result.json")} == trained
    assert any("finished before" in text for text in said)


def test_a_trial_that_failed_and_was_tried_again_counts(tuned, tmp_path, monkeypatch):
    import shutil

    folder, file, chosen, _ = tuned
    copy = tmp_path / "again"
    shutil.copytree(folder, copy)
    best = next(copy.glob("study-tune/trials/baseline.*/seed1000/result.json"))
    kept = best.read_text(encoding="utf-8")
    best.unlink()
    (best.parent / "failed.json").write_text('{"reason": "killed"}', encoding="utf-8")
    monkeypatch.setattr(
        "iterbatch.study.tune.compare", lambda *given, **named: None
    )  # what is there is all there is
    tune(file, copy, 1)
    number = int(best.parent.parent.name.rsplit(".", 1)[1])
    scores = json.loads((copy / "study-tune/tuning.json").read_text(encoding="utf-8"))[""]["baseline"]
    assert scores[number][1] is None
    (best.parent / "failed.json").unlink()
    best.write_text(kept, encoding="utf-8")
    assert tune(file, copy, 1) == chosen
    assert (
        json.loads((copy / "study-tune/tuning.json").read_text(encoding="utf-8"))[""]["baseline"][number][1]
        is not None
    )


def test_an_arm_whose_source_is_not_tuned(tuned, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        tuned[1].read_text(encoding="utf-8").replace("trials: 2", "trials: 2, arms: [baseline, permuted]"),
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="made from 'abr', which is not among the arms to tune"):
        tune(file, tmp_path, 1)
    assert main(["tune", str(file), "--workers", "0", "--save_dir", str(tmp_path)]) == 2
