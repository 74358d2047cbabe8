"""The learning rate of every arm: as many trials for each, at the same values, on seeds of their own.

What lives here: which trials are made and what is chosen. What does not: training them, which is a
comparison like any other (:mod:`iterbatch.study.run`).

A trial is scored by its mean final loss on validation over the tuning seeds. An arm whose best rate is the
lowest or highest gets further ones beyond it, until the best is inside. Arms that are made from another arm's
passes come after it, and are made from its best trial.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from iterbatch.bench.arm import Arm, make_arm
from iterbatch.config import BenchConfig
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.result import read_result
from iterbatch.records.tuning import Curve, Curves, write_curves
from iterbatch.records.write import write_text
from iterbatch.report import stats
from iterbatch.report.wording import markdown
from iterbatch.study.pairs import Cell, Engine, Notify, Study, pairs_of
from iterbatch.study.run import compare
from iterbatch.study.study_file import load_study, write_rates

Rates = dict[str, dict[str, float]]  # cell to arm to learning rate
MOST_BEYOND = 4  # further rates beyond one edge, each a step of the range away


def values(low: float, high: float, trials: int, seed: int) -> list[float]:
    """Learning rates to try: one in each of ``trials`` equal parts of the log-uniform range, shuffled."""
    random = np.random.default_rng(seed)
    places = (np.arange(trials) + random.uniform(size=trials)) / trials
    return [float(f"{value:.3g}") for value in random.permutation(low * (high / low) ** places)]


def beyond(curve: Curve, first: Sequence[float], step: float) -> float | None:
    """The next rate for an arm whose best is at an edge; None where it is inside, or far enough out.

    Args:
        curve: Of its trials so far. One that failed is worse than any.
        first: The rates that every arm was given.
        step: Factor between two rates.
    """
    best = curve.best
    if best is None:
        best = min(curve.rates)  # all failed: lower ones may not
    if best == max(curve.rates) and best < max(first) * step ** (MOST_BEYOND - 0.5):
        return float(f"{best * step:.3g}")
    if best == min(curve.rates) and best > min(first) / step ** (MOST_BEYOND - 0.5):
        return float(f"{best / step:.3g}")
    return None


def tune(path: Path, save_dir: Path, engine: Engine, notify: Notify = lambda _: None) -> Rates:
    """Make the trials that are missing, choose, and write the choices into the study file.

    Args:
        path: The study file.
        save_dir: Folder of runs; trials go to ``<study>-tune`` in it.
        engine: Trains the trials.
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
        compare(tuning.trials, tuning.folder, engine, keep_arms=True)
        while further := tuning.go_beyond(stage):
            notify(_("Best at an edge, one more rate each: {names}").format(names=", ".join(further)))
            compare(tuning.trials, tuning.folder, engine, keep_arms=True)
        for cell in study.cells:
            chosen[cell.name] |= {arm: tuning.best(cell.name, arm) for arm in stage}
    write_rates(path, chosen)
    write_text(run_dir / "tuning.md", tuning.page(chosen))
    write_curves(run_dir, tuning.curves())
    notify(
        _("Learning rates written to {path}; the trials are in {run_dir}").format(
            path=path, run_dir=run_dir / "tuning.md"
        )
    )
    curves = tuning.curves()
    left = [
        f"{cell}/{arm}".lstrip("/")
        for cell, arms in chosen.items()
        for arm, rate in arms.items()
        if curves[cell][arm].at_edge(rate)
    ]
    if left:
        notify(
            _("Still at an edge, {most_beyond} steps out: {names}. Widen tune: low, high").format(
                most_beyond=MOST_BEYOND, names=", ".join(left)
            )
        )
    return chosen


def stages(study: Study) -> list[list[str]]:
    """Names of the arms to tune, in groups: what an arm is made from is in an earlier group.

    Raises:
        ConfigError: where it is not among those to tune.
    """
    every = [arm.name for arm in study.cells[0].arms if arm.config.training.budget_share == 1]
    wanted = study.tune["arms"] or every
    arms, placed = {arm.name: arm for arm in study.cells[0].arms if arm.name in wanted}, set[str]()
    for arm in arms.values():
        if arm.source is not None and arm.source not in arms:
            where = _("'{source}', which is not among the arms to tune").format(source=arm.source)
            raise ConfigError(
                _("arm '{name}' is made from {where}; add it to tune: arms").format(
                    name=arm.name, where=where
                )
            )
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
        self.first = values(tune["low"], tune["high"], tune["trials"], tune["seed"])
        self.step = (tune["high"] / tune["low"]) ** (1 / tune["trials"])
        self.seeds = tuple(range(tune["seed"], tune["seed"] + tune["seeds"]))
        self.rates: dict[tuple[str, str], list[float]] = {}  # of a cell's arm, in the order of their numbers
        self._sources: dict[tuple[str, str], str | None] = {}  # the trial that a cell's arm is made from

    def add(self, names: Sequence[str], chosen: Mapping[str, Mapping[str, float]]) -> None:
        """The trials of some arms; ``chosen`` are the rates of those that they are made from."""
        for cell in self.study.cells:
            for arm in cell.arms:
                if arm.name in names:
                    source = arm.source
                    if source is not None:
                        number = self.rates[cell.name, source].index(chosen[cell.name][source])
                        source = _name(source, number)
                    self.rates[cell.name, arm.name] = list(self.first)
                    self._sources[cell.name, arm.name] = source

    def go_beyond(self, names: Sequence[str]) -> list[str]:
        """One more rate for each of some arms whose best is at an edge; returns what was added."""
        curves, added = self.curves(), []
        for (cell, arm), rates in self.rates.items():
            rate = beyond(curves[cell][arm], self.first, self.step) if arm in names else None
            if rate is not None:
                rates.append(rate)
                added.append(f"{cell}/{arm} {rate:g}".lstrip("/"))
        return added

    def _trials(self, arm: Arm, cell: Cell) -> list[Arm]:
        key = (cell.name, arm.name)
        source = self._sources[key]
        made_from = {} if source is None else {"source": source}
        own = {**arm.own, "strategy": arm.strategy, **made_from}
        return [
            make_arm(_name(arm.name, number), {**own, "lr": rate}, self._config(cell))
            for number, rate in enumerate(self.rates[key])
        ]

    def _config(self, cell: Cell) -> BenchConfig:
        training = dataclasses.replace(cell.config.training, seeds=self.seeds, evals=1, prompts=1)
        data, tokens = cell.config.data, self.study.tune["max_eval_tokens"]
        if tokens:
            data = dataclasses.replace(data, max_eval_tokens=tokens)
        return dataclasses.replace(cell.config, data=data, training=training)

    @property
    def trials(self) -> Study:
        """All trials so far, as a comparison."""
        cells = []
        for cell in self.study.cells:
            arms = [arm for arm in cell.arms if (cell.name, arm.name) in self.rates]
            made = tuple(trial for arm in arms for trial in self._trials(arm, cell))
            cells.append(Cell(cell.name, self._config(cell), made))
        return Study(f"{self.study.name}-tune", tuple(cells))

    def curves(self) -> Curves:
        """What the trials' folders say, by cell and arm."""
        losses: dict[tuple[str, str], list[list[float]]] = {}
        for pair in pairs_of(self.trials, self.folder):
            arm, number = pair.arm.name.rsplit(".", 1)
            rows = losses.setdefault((pair.cell.name, arm), [[] for _ in self.rates[pair.cell.name, arm]])
            rows[int(number)].append(_loss(pair.folder))
        found: Curves = {cell.name: {} for cell in self.study.cells}
        for (cell, arm), rows in losses.items():
            found[cell][arm] = Curve(tuple(self.rates[cell, arm]), tuple(map(tuple, rows)))
        return found

    def best(self, cell: str, arm: str) -> float:
        """The rate of an arm with the lowest mean loss.

        Raises:
            ConfigError: where every trial failed.
        """
        best = self.curves()[cell][arm].best
        if best is None:
            where = _(" in cell {cell}").format(cell=cell) if cell else ""
            raise ConfigError(
                _("every trial of arm '{arm}'{where} failed; lower tune: low and high").format(
                    arm=arm, where=where
                )
            )
        return best

    def page(self, chosen: Mapping[str, Mapping[str, float]]) -> str:
        """All trials, what was chosen, and the expected best of n."""
        tune = self.study.tune
        range_ = _("from {low:g} to {high:g}").format(low=tune["low"], high=tune["high"])
        seeds = _("tuning seeds: {count}, from {seed} on").format(count=len(self.seeds), seed=tune["seed"])
        lines = [
            _("# Learning rates of {name}").format(name=markdown(self.study.name)),
            "",
            _(
                "{trials} trials for each arm, at the same values {range}, {seeds}, and further ones "
                "beyond an edge where the best stood there. Final loss on validation, nats a token: "
                "mean, and standard deviation over seeds where there are several. Best of n: what the "
                "best of n of these trials, drawn at random, is expected to reach. Luck: by how much the "
                "choice may miss the best, by these seeds' own scatter."
            ).format(trials=tune["trials"], range=range_, seeds=seeds),
            "",
        ]
        for cell, arms in self.curves().items():
            lines += [f"## {markdown(cell)}", ""] if cell else []
            rates = sorted({rate for curve in arms.values() for rate in curve.rates})
            best_of = range(1, len(self.first) + 1)
            columns = [
                *(f"{rate:g}" for rate in rates),
                "luck",
                *(_("best of {n}").format(n=n) for n in best_of),
            ]
            lines += [
                _("| arm | chosen | {names} |").format(names=" | ".join(columns)),
                "|" + " --- |" * (2 + len(columns)),
            ]
            for arm, curve in arms.items():
                rate = chosen[cell][arm]
                edge = " (edge)" if curve.at_edge(rate) else ""
                cells = [*(_cell(curve, each) for each in rates), f"{stats.choice_luck(curve.table):.4f}"]
                cells += [f"{value:.4f}" for value in stats.expected_best(curve.means)[: len(best_of)]]
                lines.append(f"| {markdown(arm)} | {rate:g}{edge} | {' | '.join(cells)} |")
            lines.append("")
        return "\n".join(lines)


def _cell(curve: Curve, rate: float) -> str:
    """The mean of a rate, with its spread."""
    if rate not in curve.rates:
        return ""
    losses = curve.losses[curve.rates.index(rate)]
    if not all(map(math.isfinite, losses)):
        return "failed"
    spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
    return f"{np.mean(losses):.4f}{spread}"


def _name(arm: str, number: int) -> str:
    return f"{arm}.{number}"


def _loss(arm: Path) -> float:
    """Final loss on validation, nats a token; infinity where the trial failed."""
    if not (arm / layout.RESULT).exists():
        return math.inf
    result = read_result(arm)
    return math.log(result.val_ppl) if math.isfinite(result.val_ppl) and not result.stopped else math.inf
