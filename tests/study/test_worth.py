"""What a comparison says of its own arms: compute worth, luck of the rates, who did not adapt."""

import json
import re

import pytest
from support.studies import study_file

from iterbatch.cli.main import main
from iterbatch.errors import ConfigError
from iterbatch.records.base_table import read_base_table
from iterbatch.report.comparison import read_cells
from iterbatch.report.tables import arm_rows
from iterbatch.study.study_file import load_study

ARMS = {
    "baseline": {"lr": 0.01},
    "abr": {"loss_threshold": 9.0, "lr": 0.01},
    "excess": {"loss_threshold": 2.75},
    "fixed": None,
    "profile": {"source": "fixed"},
    "learnable": {"probe_rate": 1.0, "probe_budget": 1.0},
    "spread": {"strategy": "window", "placement": "spaced", "gap": 2},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("worth")
    file = study_file(folder, tiny_folder, ARMS, max_train_tokens=768, prompts=1, evals=2)
    file.write_text(file.read_text(encoding="utf-8") + "worth: [0.5, 2]\n", encoding="utf-8")
    trials = {arm: [[0.005, [8.0, 8.02]], [0.01, [7.9, 7.95]], [0.02, [7.95, 7.89]]] for arm in ARMS}
    (folder / "study-tune").mkdir()
    (folder / "study-tune" / "tuning.json").write_text(json.dumps({"": trials}), encoding="utf-8")
    assert main(["compare", str(file), "--save_dir", str(folder), "--workers", "1"]) == 0
    return folder / "study"


@pytest.fixture(scope="module")
def cell(run_dir):
    return read_cells(run_dir)[0]


def test_the_baseline_at_other_budgets_is_no_arm_of_the_comparison(cell):
    assert [arm.name for arm in cell.arms][-2:] == ["baseline-x0.5", "baseline-x2"]
    assert {each.arm for each in cell.against_baseline} == set(ARMS) - {"baseline"}
    flops = [
        cell.arm(name).mean(lambda result: result.flops)
        for name in ("baseline-x0.5", "baseline", "baseline-x2")
    ]
    assert flops[0] / flops[1] == pytest.approx(0.5, rel=0.1)
    assert flops[2] / flops[1] == pytest.approx(2.0, rel=0.1)
    spent, losses = cell.exchange()
    assert spent == pytest.approx([flops[0] / flops[1], 1, flops[2] / flops[1]])
    assert losses[1] == 0
    assert cell.exchange("train_seconds")[1] == losses


def test_compute_worth_has_an_interval_and_follows_the_loss(cell):
    worth = {each.arm: cell.worth(each.arm) for each in cell.against_baseline}
    for each in cell.against_baseline:
        assert worth[each.arm].low <= worth[each.arm].estimate <= worth[each.arm].high
        if abs(each.estimate) > 1e-4:
            assert (worth[each.arm].estimate > 1) == (each.estimate < 0), each.arm
    assert all(
        re.fullmatch(r"\d\.\d\d( \[.*\])?", row["worth"]) for row in arm_rows(cell) if row["arm"] in worth
    )


def test_each_seed_is_held_against_its_own_baseline(cell):
    interval, reached, of = cell.to_target("baseline")
    assert (reached, of) == (2, 2)
    assert interval.estimate == pytest.approx(1.0, rel=0.02)


def test_the_luck_of_the_rates_is_in_the_intervals(cell, run_dir):
    found = next(each for each in cell.against_baseline if each.arm == "abr")
    assert found.luck > 0.01
    assert found.interval.high - found.interval.low > 2 * 1.9 * found.luck
    assert "The choice of learning rates alone could move" in (run_dir / "report.md").read_text(
        encoding="utf-8"
    )


def test_an_arm_that_did_not_adapt_says_so_everywhere(cell, run_dir):
    said = cell.arm("abr").alike
    assert said.startswith("abr repeated no batch: their initial losses lay between 8.")
    assert "repeats a tenth of them" in said
    shown = ["summary.md", "report.md", "report.html"]
    assert all("abr repeated no batch" in (run_dir / name).read_text(encoding="utf-8") for name in shown)
    assert not cell.arm("fixed").alike  # which never meant to
    assert not cell.arm("learnable").alike


def test_base_losses_are_computed_once_for_all_and_told_apart(cell, run_dir):
    table = read_base_table(run_dir)
    assert len(table.nats) == 24
    assert cell.arm("excess").mean(lambda result: result.flops_probe) == 0
    assert "computed once for all arms and seeds" in (run_dir / "report.md").read_text(encoding="utf-8")


def test_profile_takes_the_other_seeds_passes(cell):
    planned = {
        name: [each.batches.planned.tolist() for each in cell.arm(name).seeds]
        for name in ("fixed", "profile")
    }
    assert planned["profile"][0][:3] == planned["fixed"][1][:3] == [2, 2, 2]


def test_learnable_leaves_a_scheduler_and_a_figure_of_what_it_learned(run_dir, tmp_path, tiny_folder):
    kept = json.loads((run_dir / "learnable/seed0/scheduler.json").read_text(encoding="utf-8"))
    assert kept["version"] == 1
    assert len(kept["course"]) == len(kept["probes"]) > 3
    assert {"learned.png", "tuning.png", "worth.png"} <= {
        file.name for file in (run_dir / "figures").iterdir()
    }
    arms = {"baseline": None, "later": {"strategy": "learnable", "scheduler_from": str(run_dir)}}
    file = study_file(tmp_path, tiny_folder, arms, max_train_tokens=512, seeds=[5], prompts=1)
    assert main(["compare", str(file), "--save_dir", str(tmp_path)]) == 0
    later = json.loads((tmp_path / "study/later/seed5/scheduler.json").read_text(encoding="utf-8"))
    assert len(later["probes"]) >= 2 * len(kept["probes"]) - 2  # of both seeds


def test_profile_needs_a_second_seed(tmp_path, tiny_folder, capsys):
    arms = {"baseline": None, "abr": None, "profile": None}
    file = study_file(tmp_path, tiny_folder, arms, seeds=[0])
    with pytest.raises(ConfigError, match="takes the passes of another seed"):
        load_study(file)
