"""What a comparison's records say: every arm on every axis, paired with the baseline.

Seed by seed and document by document.

What lives here: from a folder to numbers. What does not: the statistics themselves
(:mod:`iterbatch.report.stats`), and telling them (:mod:`iterbatch.report.page`).
"""

import copy
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.errors import RunError
from iterbatch.language import N_, _
from iterbatch.records import layout
from iterbatch.records.origin import check_alike
from iterbatch.records.read import SCORED, read_study, settings_of
from iterbatch.records.record import EvalRecord
from iterbatch.records.scored import Scored
from iterbatch.records.tuning import read_curves
from iterbatch.report import stats
from iterbatch.report.scores import ArmScores, SeedScores, read_arms
from iterbatch.strategy import REFERENCE, STRATEGIES
from iterbatch.strategy.base import EVERY

# Of an evaluation, by its name there, and how it is called.
AXES = {
    "flops": "FLOPs",
    "train_seconds": "seconds",
    "tokens_trained": N_("trained tokens"),
    "updates": "updates",
}


@dataclass(frozen=True)
class Comparison:
    """One arm against another."""

    arm: str
    reference: str
    seeds: list[int]  # that both have
    # Of the difference of log perplexity on the test split; None where there are fewer than 2 seeds.
    interval: stats.Interval | None
    # Infinity where the arm failed with a seed that the reference finished, minus infinity the other
    # way round.
    estimate: float
    validation: float  # the same on the validation split
    deviation: float  # over seeds; NaN with one
    improvement: float  # probability of improvement
    # Part of the estimate's standard error that comes from few documents, whatever the number of seeds.
    document_error: float = math.nan
    # Part of its standard error that comes from the choice of learning rates; NaN where it is not known.
    luck: float = math.nan
    p_adjusted: float = math.nan
    decided: bool = True  # not while a pair of its cell is still to be trained

    @property
    def verdict(self) -> str:
        """In a word: better, worse, or no difference found."""
        if not self.decided:
            return "unfinished"
        if math.isinf(self.estimate):
            return "failed" if self.estimate > 0 else "reference failed"
        if self.interval is None:
            return "no interval"
        if self.interval.low == self.interval.high == 0:
            return "trained alike"
        if math.isnan(self.p_adjusted) or self.p_adjusted >= 0.05:
            return "no difference found"
        return "better" if self.estimate < 0 else "worse"


class CellScores:
    """One cell of a study, or a run: its arms, scored.

    Args:
        run_dir: Its folder.
        name: Of the cell; empty for a study of one.
        arms: What each arm sets for itself, by name and in their order; default: what their results say.
        seeds: That its arms are trained with; default: those there are.

    Raises:
        RunError: where a record that is needed is damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str = "",
        arms: Mapping[str, Any] | None = None,
        seeds: Sequence[int] = (),
    ) -> None:
        self.run_dir, self.name = run_dir, name
        self._own = {arm: _own(settings) for arm, settings in (arms or {}).items()}
        self.open = _open(run_dir, self._own, seeds)  # still to be trained: no verdict before
        self.arms = read_arms(run_dir, {arm: str(own.get("strategy", arm)) for arm, own in self._own.items()})
        self.config = settings_of(run_dir)
        study = run_dir.parent if name else run_dir
        self.tuning = read_curves(study).get(name, {})  # how its arms' learning rates were found

    def with_arms(self, arms: list[ArmScores]) -> "CellScores":
        """The same cell with other scores."""
        changed = copy.copy(self)
        changed.arms = arms
        return changed

    @property
    def reportable(self) -> bool:
        """Whether any arm has a result."""
        return any(each.result is not None for arm in self.arms for each in arm.seeds)

    def arm(self, name: str) -> ArmScores | None:
        """An arm by name."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def own(self, name: str) -> Mapping[str, Any]:
        """What an arm sets for itself."""
        return self._own.get(name, {})

    def compute_ratio(self, name: str) -> float:
        """Mean over seeds of an arm's FLOPs over the baseline's with the same seed; NaN without one."""
        arm, baseline = self.arm(name), self.arm(REFERENCE)
        if arm is None or baseline is None:
            return math.nan
        spent = {each.seed: each.result.flops for each in baseline.seeds if each.result is not None}
        ratios = [
            each.result.flops / (spent.get(each.seed) or math.nan)
            for each in arm.seeds
            if each.result is not None
        ]
        return statistics.fmean(ratios) if ratios else math.nan

    @property
    def compared(self) -> list[ArmScores]:
        """The arms that are compared with the baseline: those with the same budget."""
        baseline = self.arm(REFERENCE)
        share = 1.0 if baseline is None else baseline.budget_share
        return [arm for arm in self.arms if arm.name != REFERENCE and arm.budget_share == share]

    @property
    def unit(self) -> str:
        """What all arms could spend the same of."""
        return str(self.config.get("match", "epochs"))

    @property
    def scored(self) -> dict[str, Scored]:
        """How much text the numbers rest on, by split; empty where an earlier version kept no documents."""
        each = next((seed for arm in self.arms for seed in arm.finished if seed.documents), None)
        return {} if each is None else {split: Scored.of(each.documents[split][1]) for split in SCORED}

    @cached_property
    def method(self) -> tuple[str, dict[str, float]]:
        """The interval for this many seeds and documents, and every method's simulated coverage."""
        found = [self._table(arm.name, REFERENCE) for arm in self.compared]
        tables = [table for table in found if table is not None]
        sizes = {table.shape for table in tables if len(table) > 1}
        if not sizes:
            return "t", {}
        shape = min(sizes)
        parts = np.mean([stats.components(table) for table in tables if table.shape == shape], axis=0)
        whole = parts.sum() or 1.0
        return stats.choose_method(*shape, tuple(round(float(part / whole), 2) for part in parts))

    def _table(self, name: str, other: str, split: str = "test") -> np.ndarray | None:
        pairs = self._pairs(name, other, split)
        if not pairs:
            return None
        ours, theirs = (
            np.array([each.documents[split][0] for each in side]) for side in zip(*pairs, strict=True)
        )
        return stats.difference(ours, theirs, pairs[0][0].documents[split][1])[1]

    def _pairs(self, name: str, other: str, split: str) -> list[tuple[SeedScores, SeedScores]]:
        """Seeds that both finished, scored on the same documents."""
        arm, reference = self.arm(name), self.arm(other)
        if arm is None or reference is None:
            return []
        theirs = {each.seed: each for each in reference.finished if split in each.documents}
        found = [
            (each, theirs[each.seed])
            for each in arm.finished
            if each.seed in theirs and split in each.documents
        ]
        return [
            (one, two)
            for one, two in found
            if np.array_equal(one.documents[split][1], two.documents[split][1])
        ]

    def compare(self, name: str, other: str = REFERENCE) -> Comparison | None:
        """One arm against another, paired by seed.

        None where one of them is not there or no seed is in both.
        """
        arm, reference = self.arm(name), self.arm(other)
        if arm is None or reference is None:
            return None
        pairs = self._pairs(name, other, "test")
        seeds = [one.seed for one, _ in pairs]
        losses = ([each.loss("test") for each in side.seeds] for side in (arm, reference))
        improvement = stats.probability_of_improvement(*losses)
        for one, two, estimate in ((arm, reference, math.inf), (reference, arm, -math.inf)):
            if {each.seed for each in one.failures} & {each.seed for each in two.finished}:
                return Comparison(name, other, seeds, None, estimate, estimate, math.nan, improvement)
        if not pairs:
            return None
        ours, theirs = (
            np.array([each.documents["test"][0] for each in side]) for side in zip(*pairs, strict=True)
        )
        tokens = pairs[0][0].documents["test"][1]
        luck = math.hypot(self.luck(arm), self.luck(reference))
        interval = stats.compare(ours, theirs, tokens, self.method[0]) if len(pairs) > 1 else None
        interval = None if interval is None else stats.with_luck(interval, luck)
        by_seed = [
            (one.loss("test") - two.loss("test"), one.loss("validation") - two.loss("validation"))
            for one, two in pairs
        ]
        table = stats.difference(ours, theirs, tokens)[1]
        several = len(pairs) > 1
        return Comparison(
            arm=name,
            reference=other,
            seeds=seeds,
            interval=interval,
            estimate=statistics.fmean(test for test, _ in by_seed),
            validation=statistics.fmean(validation for _, validation in by_seed),
            deviation=statistics.stdev(test for test, _ in by_seed) if several else math.nan,
            improvement=improvement,
            document_error=math.sqrt(stats.components(table)[1] / table.shape[1]) if several else math.nan,
            luck=luck,
        )

    def luck(self, arm: ArmScores) -> float:
        """By how much the choice of an arm's learning rate may miss its best, nats; NaN where not known."""
        curve = self.tuning.get(arm.name)
        if curve is None or arm.rate not in curve.rates:
            return math.nan
        return stats.choice_luck(curve.table)

    def documents(self, name: str) -> int:
        """Documents of the test split that an arm was scored on; 0 where it finished no seed."""
        arm = self.arm(name)
        return (
            next((len(each.documents["test"][0]) for each in arm.finished if "test" in each.documents), 0)
            if arm
            else 0
        )

    @cached_property
    def against_baseline(self) -> list[Comparison]:
        """Every arm against the baseline, its p-values adjusted for their number."""
        return self._adjusted([self.compare(arm.name) for arm in self.compared])

    @cached_property
    def questions(self) -> list[tuple[str, Comparison]]:
        """What the controls that are there answer.

        p-values are adjusted for the number of controls, or of arms where the baseline is the control.
        """
        known = {(each.arm, each.reference): each for each in self.against_baseline}
        asked = [self.compare(arm, control) for _, arm, control in self._asked if control != REFERENCE]
        known |= {(each.arm, each.reference): each for each in self._adjusted(asked)}
        return [
            (question, known[arm, control])
            for question, arm, control in self._asked
            if (arm, control) in known
        ]

    def _adjusted(self, comparisons: Sequence[Comparison | None]) -> list[Comparison]:
        found = [each for each in comparisons if each is not None]
        if self.open:
            return [dataclasses.replace(each, decided=False) for each in found]
        adjusted = iter(stats.holm([each.interval.p for each in found if each.interval is not None]))
        return [
            dataclasses.replace(each, p_adjusted=math.nan if each.interval is None else next(adjusted))
            for each in found
        ]

    @property
    def unpaired(self) -> list[tuple[str, int]]:
        """Arms and seeds that ended as the baseline's did, and were scored on other documents, or on none."""
        baseline = self.arm(REFERENCE)
        theirs = {each.seed for each in baseline.finished} if baseline else set()
        paired = {
            arm.name: {one.seed for one, _ in self._pairs(arm.name, REFERENCE, "test")}
            for arm in self.compared
        }
        return [
            (arm.name, each.seed)
            for arm in self.compared
            for each in arm.finished
            if each.seed in theirs - paired[arm.name]
        ]

    @property
    def _asked(self) -> list[tuple[str, str, str]]:
        """Question, the arm whose claim is examined, the control it must beat: as the strategies say."""
        kinds = list(STRATEGIES)
        known = sorted(
            (arm for arm in self.compared if arm.kind in STRATEGIES), key=lambda arm: kinds.index(arm.kind)
        )
        adaptive = [arm.name for arm in known if STRATEGIES[arm.kind].adapts]
        return [asked for arm in known for asked in _questions(arm, adaptive)]

    # -- time to target, and what compute is worth -----------------------------------------------------------

    def to_target(self, name: str, axis: str = "flops") -> tuple[stats.Interval, int, int]:
        """How many times less an arm spent to reach what its own baseline, of the same seed, ends with.

        Returns:
            That, on validation; the seeds that reached it, and all seeds.
        """
        arm, baseline = self.arm(name), self.arm(REFERENCE)
        assert arm is not None
        own = {each.seed: each for each in baseline.finished if each.validation} if baseline else {}
        pairs = [(each, own[each.seed]) for each in arm.seeds if each.seed in own]
        whole = [float(getattr(two.validation[-1], axis)) for _, two in pairs]
        costs = [self._cost(one, axis, _loss(two.validation[-1])) for one, two in pairs]
        reached = sum(map(math.isfinite, costs))
        if not pairs:
            return stats.Interval(0.0, math.nan, math.nan, math.nan, "missed"), 0, len(arm.seeds)
        return stats.speed_up(whole, costs), reached, len(pairs)

    def _cost(self, scores: SeedScores, axis: str, target: float) -> float:
        records = scores.validation
        if scores.failed is not None or not records:
            return math.inf
        if _loss(records[0]) <= target:
            # The untrained base is there already; what counts is an arm that was trained.
            records = records[1:]
        costs = [getattr(record, axis) for record in records]
        return stats.cost_to_target(costs, list(map(_loss, records)), target)

    def exchange(self, axis: str = "flops") -> tuple[list[float], list[float]] | None:
        """What the baseline spent at its several budgets, as shares, and how its final loss differs; or None.

        Args:
            axis: ``flops`` or ``train_seconds``.
        """
        ladder = [arm for arm in self.arms if arm.kind == REFERENCE and arm.budget_share != 1]
        steps = [
            (
                statistics.fmean(_spent(one, axis) / _spent(two, axis) for one, two in pairs),
                statistics.fmean(one.loss("test") - two.loss("test") for one, two in pairs),
            )
            for pairs in (self._pairs(arm.name, REFERENCE, "test") for arm in ladder)
            if pairs
        ]
        if not steps:
            return None
        shares, losses = zip(*sorted([*steps, (1.0, 0.0)]), strict=True)
        return list(shares), list(losses)

    def worth(self, name: str, axis: str = "flops") -> stats.Interval | None:
        """Compute that the baseline needs to end where an arm does, over what the arm spent: above 1 it pays.

        The same with ``axis`` as ``train_seconds``.

        Geometric mean over seeds, each against its own baseline, with a t interval, in which the rate of
        exchange is taken as known. None where the baseline was trained at one budget only, no seed is in
        both, or no compute is known at which the baseline ends as low with some seed.
        """
        pairs, ladder = self._pairs(name, REFERENCE, "test"), self.exchange(axis)
        if ladder is None or not pairs:
            return None
        share = stats.exchange(*ladder)
        needed = [share(one.loss("test") - two.loss("test")) for one, two in pairs]
        if math.inf in needed:
            return None
        spent = [_spent(one, axis) / _spent(two, axis) for one, two in pairs]
        return stats.speed_up(needed, spent)

    @property
    def skipped_lines(self) -> int:
        """Lines of records that could not be read."""
        return sum(each.skipped_lines for arm in self.arms for each in arm.seeds)


def _loss(record: EvalRecord) -> float:
    return record.nats / record.tokens


def _spent(scores: SeedScores, axis: str) -> float:
    """Of a run, ``flops`` or ``train_seconds``; not a number where none are recorded."""
    return float(getattr(scores.result, axis, 0)) or math.nan


def _questions(arm: ArmScores, adaptive: Sequence[str]) -> list[tuple[str, str, str]]:
    """What an arm's strategy asks: question, who is examined, who must be beaten."""
    kind = STRATEGIES[arm.kind]
    if not kind.question:
        return [(_("Does {name} beat training every batch once?").format(name=arm.name), arm.name, REFERENCE)]
    source = arm.settings.source if arm.settings is not None and kind.made_from else None
    if kind.rival:
        pairs = [(arm.name, kind.rival)]
    elif kind.arm == EVERY:
        pairs = [(each, arm.name) for each in adaptive]
    else:
        pairs = [(source or kind.arm, arm.name)]
    asked = []
    for examined, rival in pairs:
        names = [arm.name] if arm.name != arm.kind else []
        names += [examined] if kind.arm == EVERY and len(pairs) > 1 else []
        names += [f"of {source}"] if source not in (None, kind.arm) else []
        question = _(kind.question)
        asked.append((f"{question} ({', '.join(names)})" if names else question, examined, rival))
    return asked


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_cells(run_dir: Path) -> list[CellScores]:
    """The cells of a study that have a result, in its order, or the one of a run.

    Raises:
        RunError: where there is nothing to report, or cells of one name were made from different things.
    """
    if not run_dir.is_dir():
        raise RunError(
            _("{run_dir} is not a folder; give the folder of a run or a comparison").format(run_dir=run_dir)
        )
    cells = [cell for cell in cells_of(run_dir) if cell.reportable]
    if not cells:
        raise RunError(
            _("{run_dir} has no finished arm; there is nothing to report yet").format(run_dir=run_dir)
        )
    check_alike({cell.run_dir: settings_of(cell.run_dir) for cell in cells})
    return cells


def cells_of(run_dir: Path) -> list[CellScores]:
    """All cells of a study, in its order, or the one of a run, whether they have a result or not."""
    if (run_dir / layout.STUDY).exists():
        cells: Mapping[str, Any] = read_study(run_dir)["cells"]
        return [CellScores(run_dir / name, name, cell["arms"], _seeds(cell)) for name, cell in cells.items()]
    names = settings_of(run_dir).get("strategies")  # of a run of an earlier version
    return [CellScores(run_dir, arms=dict.fromkeys(names) if isinstance(names, list) else None)]


def open_pairs(run_dir: Path) -> list[tuple[str, int]]:
    """Arms and seeds of a study that are still to be trained, in all of its cells."""
    if not (run_dir / layout.STUDY).exists():
        return []
    cells = read_study(run_dir)["cells"].items()
    return [pair for name, cell in cells for pair in _open(run_dir / name, cell["arms"], _seeds(cell))]


def _open(folder: Path, arms: Iterable[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    pairs = itertools.product(arms, seeds)
    return [pair for pair in pairs if not layout.ended(layout.arm_folder(folder, *pair))]


def _seeds(cell: Mapping[str, Any]) -> list[int]:
    return [seed for seed in cell["config"].get("seeds") or () if isinstance(seed, int)]


def _own(settings: Any) -> Mapping[str, Any]:
    return settings if isinstance(settings, dict) else {}
