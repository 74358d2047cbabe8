"""Learning rates: as many trials for every arm, at the same values, resumed where they stopped."""

import math
import shutil

import numpy as np
import pytest
from support.studies import study_file

from iterbatch.cli.main import main
from iterbatch.errors import ConfigError
from iterbatch.records.result import read_result
from iterbatch.records.tuning import Curve, read_curves
from iterbatch.study.engines.processes import Processes
from iterbatch.study.study_file import load_study
from iterbatch.study.tune import MOST_BEYOND, Tuning, beyond, tune, values


def test_values_cover_the_range_evenly_on_a_log_scale():
    found = values(1e-4, 1e-1, 6, seed=3)
    places = sorted((math.log10(value) + 4) / 3 for value in found)
    assert [int(place * 6) for place in places] == list(range(6))
    assert found != sorted(found)
    assert found == values(1e-4, 1e-1, 6, seed=3) != values(1e-4, 1e-1, 6, seed=4)


@pytest.mark.parametrize(
    ("losses", "further"),
    [
        ([3.0, 2.9, 2.8, 2.9], None),  # inside
        ([2.8, 2.9, 3.0, 3.1], 0.5),
        ([3.0, 2.9, 2.8, 2.7], 16.0),
        ([3.0, 2.9, 2.8, math.inf], None),  # what diverges bounds the range
        ([math.inf] * 4, 0.5),  # all of them: lower ones may not
    ],
)
def test_a_best_rate_at_an_edge_asks_for_one_beyond_it(losses, further):
    rates = (1.0, 2.0, 4.0, 8.0)
    assert beyond(Curve(rates, tuple((loss, loss) for loss in losses)), rates, 2.0) == further


def test_it_goes_four_steps_beyond_an_edge_at_most():
    rates = [1.0, 2.0]
    while (
        rate := beyond(Curve(tuple(rates), tuple((-rate,) for rate in rates)), (1.0, 2.0), 2.0)
    ) is not None:
        rates.append(rate)
    assert rates == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder):
    """A study of three arms, one made from another, after tuning; and what was said."""
    folder = tmp_path_factory.mktemp("tune")
    arms = {"baseline": None, "abr": {"loss_threshold": 2.75}, "permuted": {"source": "abr"}}
    file = study_file(folder, tiny_folder, arms, max_train_tokens=256)
    text = (
        file.read_text(encoding="utf-8")
        + "tune: {trials: 2, seeds: 2, low: 1e-3, high: 1e-1}  # a comment that stays\n"
    )
    file.write_text(text, encoding="utf-8")
    said = []
    return folder, file, tune(file, folder, Processes(1, said.append), said.append), said


def test_every_arm_gets_the_same_trials_on_all_seeds_and_its_best_mean_is_written(tuned):
    folder, file, chosen, _ = tuned
    curves = read_curves(folder / "study-tune")[""]
    for arm, curve in curves.items():
        assert list(curve.rates[:2]) == values(1e-3, 1e-1, 2, seed=1000)
        assert curve.table.shape[1] == 2
        for number, losses in enumerate(curve.losses):
            for seed, loss in zip((1000, 1001), losses, strict=True):
                result = read_result(folder / f"study-tune/trials/{arm}.{number}/seed{seed}")
                assert loss == pytest.approx(math.log(result.val_ppl))
        assert chosen[""][arm] == curve.rates[int(np.argmin(curve.table.mean(axis=1)))]
        # It went on until the best was inside, or four steps beyond the edge.
        assert len(curve.rates) > 2
        step = 10.0
        assert not curve.at_edge(chosen[""][arm]) or len(curve.rates) == 2 + MOST_BEYOND
        assert max(curve.rates) <= 0.1 * step**MOST_BEYOND
    assert "# a comment that stays" in file.read_text(encoding="utf-8")
    study = load_study(file)
    assert {arm.name: arm.config.training.lr for arm in study.cells[0].arms} == chosen[""]
    page = (folder / "study-tune/tuning.md").read_text(encoding="utf-8")
    assert "best of 2" in page
    assert " ± " in page


def test_tuning_goes_on_where_it_stopped(tuned):
    folder, file, chosen, _ = tuned
    trained = {each: each.stat().st_mtime_ns for each in folder.rglob("result.json")}
    said = []
    assert tune(file, folder, Processes(1, said.append), said.append) == chosen
    assert {each: each.stat().st_mtime_ns for each in folder.rglob("result.json")} == trained
    assert any("finished before" in text for text in said)


def test_a_trial_that_failed_and_was_tried_again_counts(tuned, tmp_path, monkeypatch):
    folder, file, chosen, _ = tuned
    copy = tmp_path / "again"
    shutil.copytree(folder, copy)
    rates = read_curves(folder / "study-tune")[""]["baseline"].rates
    number = rates.index(chosen[""]["baseline"])
    best = copy / f"study-tune/trials/baseline.{number}/seed1001/result.json"
    kept = best.read_text(encoding="utf-8")
    best.unlink()
    (best.parent / "failed.json").write_text('{"reason": "killed"}', encoding="utf-8")
    monkeypatch.setattr(
        "iterbatch.study.tune.compare", lambda *given, **named: None
    )  # what is there is all there is
    tune(file, copy, Processes(1))
    assert read_curves(copy / "study-tune")[""]["baseline"].losses[number][1] == math.inf
    (best.parent / "failed.json").unlink()
    best.write_text(kept, encoding="utf-8")
    assert tune(file, copy, Processes(1)) == chosen
    assert math.isfinite(read_curves(copy / "study-tune")[""]["baseline"].losses[number][1])


def test_trials_may_be_scored_on_less_text_than_their_arms(tuned, tmp_path):
    file = tmp_path / "study.yaml"
    text = tuned[1].read_text(encoding="utf-8")
    file.write_text(text.replace("trials: 2", "trials: 2, max_eval_tokens: 77"), encoding="utf-8")
    study = load_study(file)
    (cell,) = Tuning(study, tmp_path / "trials").trials.cells
    assert cell.config.data.max_eval_tokens == 77 != study.cells[0].config.data.max_eval_tokens
    study = load_study(tuned[1])
    (cell,) = Tuning(study, tmp_path / "trials").trials.cells
    assert cell.config.data.max_eval_tokens == study.cells[0].config.data.max_eval_tokens


def test_an_arm_whose_source_is_not_tuned(tuned, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        tuned[1].read_text(encoding="utf-8").replace("trials: 2", "trials: 2, arms: [baseline, permuted]"),
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="made from 'abr', which is not among the arms to tune"):
        tune(file, tmp_path, Processes(1))
    assert main(["tune", str(file), "--workers", "0", "--save_dir", str(tmp_path)]) == 2
