"""The learning rate of every arm: as many trials for each, at the same values, on a seed of its own.

What lives here: which trials are made and what is chosen. What does not: training them, which is a
comparison like any other (:mod:`iterbatch.study.run`).

A trial is scored by its final loss on validation. Arms that are made from another arm's passes come
after it, and are made from its best trial.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from iterbatch.bench.arm import Arm, make_arm
from iterbatch.config import BenchConfig
from iterbatch.errors import ConfigError
from iterbatch.records import layout
from iterbatch.records.result import read_result
from iterbatch.records.write import write_json, write_text
from iterbatch.report import stats
from iterbatch.report.wording import markdown
from iterbatch.study.pairs import Cell, Notify, Study, pairs_of
from iterbatch.study.run import compare
from iterbatch.study.study_file import load_study, write_rates

Rates = dict[str, dict[str, float]]  # cell to arm to learning rate
Trials = dict[
    str, dict[str, list[tuple[float, float | None]]]
]  # cell to arm to (rate, loss), None where it failed


def values(low: float, high: float, trials: int, seed: int) -> list[float]:
    """Learning rates to try: one in each of ``trials`` equal parts of the log-uniform range, shuffled."""
    random = np.random.default_rng(seed)
    places = (np.arange(trials) + random.uniform(size=trials)) / trials
    return [float(f"{value:.3g}") for value in random.permutation(low * (high / low) ** places)]


def tune(path: Path, save_dir: Path, workers: int, notify: Notify = lambda _: None) -> Rates:
    """Make the trials that are missing, choose, and write the choices into the study file.

    Args:
        path: The study file.
        save_dir: Folder of runs; trials go to ``<study>-tune`` in it.
        workers: Processes at a time.
        notify: Is notified of how it goes.

    Returns:
        The learning rate of every arm, by cell.

    Raises:
        ConfigError: where the study file is wrong, or every trial of an arm failed.
        RunError: where trials cannot be trained.
    """
    study = load_study(path)
    run_dir = save_dir / f"{study.name}-tune"
    tuning, chosen = Tuning(study, run_dir / "trials"), {cell.name: {} for cell in study.cells}
    for stage in stages(study):
        tuning.add(stage, chosen)
        compare(tuning.trials, tuning.folder, workers, notify, keep_arms=True)
        for cell in study.cells:
            chosen[cell.name] |= {arm: tuning.best(cell.name, arm) for arm in stage}
    write_rates(path, chosen)
    write_text(run_dir / "tuning.md", tuning.page(chosen))
    write_json(run_dir / "tuning.json", tuning.scores())
    notify(f"Learning rates written to {path}; the trials are in {run_dir / 'tuning.md'}")
    rates = {f"{cell}/{arm}".lstrip("/"): rate for cell, arms in chosen.items() for arm, rate in arms.items()}
    if at_edge := [name for name, rate in rates.items() if tuning.at_edge(rate)]:
        beyond = "so there may be better ones beyond it"
        advice = "Widen tune: low, high in another study"
        notify(f"At the edge of the range tried, {beyond}: {', '.join(at_edge)}. {advice}")
    return chosen


def stages(study: Study) -> list[list[str]]:
    """Names of the arms to tune, in groups: what an arm is made from is in an earlier group.

    Raises:
        ConfigError: where it is not among those to tune.
    """
    wanted = study.tune["arms"] or [arm.name for arm in study.cells[0].arms]
    arms, placed = {arm.name: arm for arm in study.cells[0].arms if arm.name in wanted}, set[str]()
    for arm in arms.values():
        if arm.source is not None and arm.source not in arms:
            where = f"'{arm.source}', which is not among the arms to tune"
            raise ConfigError(f"arm '{arm.name}' is made from {where}; add it to tune: arms")
    found = []
    while len(placed) < len(arms):
        ready = [
            name
            for name, arm in arms.items()
            if name not in placed and (arm.source is None or arm.source in placed)
        ]
        placed.update(ready)
        found.append(ready)
    return found


class Tuning:
    """The trials of a study: arms named ``ARM.N`` for the N-th learning rate, in cells like its own.

    Args:
        study: To be tuned.
        folder: Of the trials.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        tune = study.tune
        self.rates = values(tune["low"], tune["high"], tune["trials"], tune["seed"])
        self._arms: dict[str, list[Arm]] = {cell.name: [] for cell in study.cells}

    def add(self, names: Sequence[str], chosen: Mapping[str, Mapping[str, float]]) -> None:
        """The trials of some arms; ``chosen`` are the rates of those that they are made from."""
        for cell in self.study.cells:
            for arm in cell.arms:
                if arm.name in names:
                    source = None
                    if arm.source is not None:
                        source = _name(arm.source, self.rates.index(chosen[cell.name][arm.source]))
                    self._arms[cell.name] += self._trials(arm, self._config(cell), source)

    def _trials(self, arm: Arm, config: BenchConfig, source: str | None) -> list[Arm]:
        made_from = {} if source is None else {"source": source}
        own = {**arm.own, "strategy": arm.strategy, **made_from}
        names = [_name(arm.name, number) for number in range(len(self.rates))]
        return [
            make_arm(name, {**own, "lr": rate}, config) for name, rate in zip(names, self.rates, strict=True)
        ]

    def _config(self, cell: Cell) -> BenchConfig:
        training = dataclasses.replace(
            cell.config.training, seeds=(self.study.tune["seed"],), evals=1, prompts=1
        )
        return dataclasses.replace(cell.config, training=training)

    @property
    def trials(self) -> Study:
        """All trials so far, as a comparison."""
        cells = [
            Cell(cell.name, self._config(cell), tuple(self._arms[cell.name])) for cell in self.study.cells
        ]
        return Study(f"{self.study.name}-tune", tuple(cells))

    def scores(self) -> Trials:
        """What the trials' folders say, in the order of their numbers."""
        found: Trials = {cell.name: {} for cell in self.study.cells}
        for pair in pairs_of(self.trials, self.folder):
            arm, number = pair.arm.name.rsplit(".", 1)
            found[pair.cell.name].setdefault(arm, []).append((self.rates[int(number)], _loss(pair.folder)))
        return found

    def best(self, cell: str, arm: str) -> float:
        """The rate of an arm with the lowest loss.

        Raises:
            ConfigError: where every trial failed.
        """
        good = [(loss, rate) for rate, loss in self.scores()[cell][arm] if loss is not None]
        if not good:
            where = f" in cell {cell}" if cell else ""
            raise ConfigError(f"every trial of arm '{arm}'{where} failed; lower tune: high")
        return min(good)[1]

    def at_edge(self, rate: float) -> bool:
        """Whether a rate is the lowest or the highest that was tried."""
        return rate in (min(self.rates), max(self.rates))

    def page(self, chosen: Mapping[str, Mapping[str, float]]) -> str:
        """All trials, what was chosen, and the expected best of n."""
        tune, order = self.study.tune, sorted(self.rates)
        range_ = f"from {tune['low']:g} to {tune['high']:g}"
        lines = [
            f"# Learning rates of {markdown(self.study.name)}",
            "",
            f"{tune['trials']} trials for each arm, at the same values {range_}, seed {tune['seed']}, "
            "scored by the "
            "final loss on validation, nats a token. Best of n: what the best of n of these trials, drawn "
            "at random, "
            "is expected to reach.",
            "",
        ]
        for cell, arms in self.scores().items():
            lines += [f"## {markdown(cell)}", ""] if cell else []
            columns = [*(f"{rate:g}" for rate in order), *(f"best of {n + 1}" for n in range(len(order)))]
            lines += [f"| arm | chosen | {' | '.join(columns)} |", "|" + " --- |" * (2 + len(columns))]
            for arm, trials in arms.items():
                rate = chosen[cell][arm]
                edge = " (edge)" if self.at_edge(rate) else ""
                lines.append(f"| {markdown(arm)} | {rate:g}{edge} | {' | '.join(_cells(trials, order))} |")
            lines.append("")
        return "\n".join(lines)


def _cells(trials: Sequence[tuple[float, float | None]], order: Sequence[float]) -> list[str]:
    """The losses in the order of the rates, then the expected best of 1, 2, ... trials."""
    losses = dict(trials)
    shown = ["failed" if (loss := losses.get(rate)) is None else f"{loss:.4f}" for rate in order]
    expected = stats.expected_best([math.inf if loss is None else loss for _, loss in trials])
    return [*shown, *(f"{value:.4f}" for value in expected)]


def _name(arm: str, number: int) -> str:
    return f"{arm}.{number}"


def _loss(arm: Path) -> float | None:
    """Final loss on validation, nats a token; None where the trial failed."""
    if not (arm / layout.RESULT).exists():
        return None
    result = read_result(arm)
    return math.log(result.val_ppl) if math.isfinite(result.val_ppl) and not result.stopped else None
