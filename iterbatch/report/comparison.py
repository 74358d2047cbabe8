"""What a comparison's records say: every arm on every axis, paired with the baseline, seed by seed and document by document.

What lives here: from a folder to numbers. What does not: the statistics themselves (:mod:`iterbatch.report.stats`), and telling them
(:mod:`iterbatch.report.page`).
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.runtime import run_folder as folder
from iterbatch.report import stats
from iterbatch.study.compare import FAILED, STUDY, reason_of
from iterbatch.errors import DataError, RunError
from iterbatch.records.record import BatchRecord, EvalRecord, Record, read_lines
from iterbatch.report.summary import read_result
from iterbatch.study.study_file import REFERENCE, from_json

AXES = {"flops": "FLOPs", "train_seconds": "seconds", "tokens_trained": "trained tokens", "updates": "updates"}
SPLITS = ("test", "validation")

# What each control answers: the question, the arm whose claim is examined, the control it must beat.
QUESTIONS = (
    ("Does ABR beat training every batch once?", "abr", "baseline"),
    ("Does the loss signal matter (which batches are repeated, and when)?", "abr", "permuted"),
    ("Does it matter, against draws from the same histogram?", "abr", "random"),
    ("Is it high-loss batches that deserve repeats?", "abr", "inverse"),
    ("Is difficulty beyond the base's a better signal than difficulty?", "excess", "abr"),
    ("Does ABR beat the same number of passes for every batch?", "abr", "fixed"),
    ("Does ABR beat two passes for every batch?", "abr", "fixed2"),
    ("Does ABR beat three passes for every batch?", "abr", "fixed3"),
    ("Does ABR beat five passes for every batch?", "abr", "fixed5"),
    ("Is it more than a larger learning rate on the same batches?", "abr", "scaled_lr"),
    ("Is it more than a larger learning rate everywhere?", "abr", "higher_lr"),
    ("Is it more than a weight on the loss?", "abr", "weighted"),
    ("Does immediacy matter, against the same passes later?", "abr", "spaced"),
    ("Is it more than many small updates on fresh text?", "abr", "small_batches"),
    ("Does it beat choosing batches by their loss?", "abr", "selective"),
)


@dataclass(frozen=True)
class SeedScores:
    """One arm with one seed."""

    seed: int
    folder: Path
    result: dict[str, Any] | None  # None where the pair failed
    evals: list[EvalRecord] = field(default_factory=list)
    documents: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # split to (nats, tokens) a document
    failed: str | None = None  # why: it crashed, or diverged
    skipped_lines: int = 0  # of its records, that could not be read

    @property
    def validation(self) -> list[EvalRecord]:
        """Evaluations of the validation split, in order."""
        return [record for record in self.evals if record.split == "validation"]

    def loss(self, split: str) -> float:
        """Final mean nats a token; infinity where the pair failed."""
        if self.failed is not None or self.result is None or split not in self.documents:
            return math.inf
        nats, tokens = self.documents[split]
        return float(nats.sum() / tokens.sum())


@dataclass(frozen=True)
class ArmScores:
    """One arm over its seeds."""

    name: str
    seeds: list[SeedScores]

    @property
    def finished(self) -> list[SeedScores]:
        """Seeds that did not fail."""
        return [each for each in self.seeds if each.failed is None]

    @property
    def failures(self) -> list[SeedScores]:
        """Seeds that crashed or diverged."""
        return [each for each in self.seeds if each.failed is not None]

    def values(self, key: str) -> list[float]:
        """A figure of the results, of each finished seed that has it."""
        found = [each.result.get(key) for each in self.finished if each.result is not None]
        return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]

    def mean(self, key: str) -> float:
        """Mean over finished seeds; NaN where there is none."""
        values = self.values(key)
        return statistics.fmean(values) if values else math.nan

    def nested(self, *keys: str) -> float:
        """Mean over finished seeds of a figure within tables; NaN where none has it."""
        found = []
        for each in self.finished:
            value: Any = each.result
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float) and math.isfinite(value):
                found.append(float(value))
        return statistics.fmean(found) if found else math.nan


@dataclass(frozen=True)
class Comparison:
    """One arm against another."""

    arm: str
    reference: str
    seeds: list[int]  # that both have
    interval: stats.Interval | None  # of the difference of log perplexity on the test split; None where there are fewer than 2 seeds
    estimate: float  # infinity where the arm failed with a seed that the reference finished, minus infinity the other way round
    validation: float  # the same on the validation split
    deviation: float  # over seeds; NaN with one
    improvement: float  # probability of improvement
    document_error: float = math.nan  # part of the estimate's standard error that comes from few documents, whatever the number of seeds
    p_adjusted: float = math.nan

    @property
    def verdict(self) -> str:
        """In a word: better, worse, or no difference found."""
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

    Raises:
        RunError: where it has no finished arm.
    """

    def __init__(self, run_dir: Path, name: str = "", order: Sequence[str] = ()) -> None:
        self.run_dir, self.name = run_dir, name
        names = sorted({file.parent.parent.name for pattern in ("result.json", FAILED) for file in run_dir.glob(f"*/seed*/{pattern}")})
        names.sort(key=lambda arm: order.index(arm) if arm in order else len(order))
        self.arms = [ArmScores(arm, _seeds(run_dir / arm)) for arm in names]
        if not any(arm.finished for arm in self.arms):
            raise RunError(f"{run_dir} has no finished arm; there is nothing to report yet")
        config = folder.read_config(run_dir) if (run_dir / folder.CONFIG).exists() else {}
        self.config = config

    def arm(self, name: str) -> ArmScores | None:
        """An arm by name."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def unit(self) -> str:
        """What all arms could spend the same of."""
        return str(self.config.get("match", "epochs"))

    @cached_property
    def method(self) -> tuple[str, dict[str, float]]:
        """The interval for this many seeds and documents, and every method's simulated coverage."""
        tables = [table for arm in self.arms if arm.name != REFERENCE for table in [self._table(arm.name, REFERENCE)] if table is not None]
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
        ours, theirs = (np.array([each.documents[split][0] for each in side]) for side in zip(*pairs, strict=True))
        return stats.difference(ours, theirs, pairs[0][0].documents[split][1])[1]

    def _pairs(self, name: str, other: str, split: str) -> list[tuple[SeedScores, SeedScores]]:
        """Seeds that both finished, scored on the same documents."""
        arm, reference = self.arm(name), self.arm(other)
        if arm is None or reference is None:
            return []
        theirs = {each.seed: each for each in reference.finished if split in each.documents}
        found = [(each, theirs[each.seed]) for each in arm.finished if each.seed in theirs and split in each.documents]
        return [(one, two) for one, two in found if np.array_equal(one.documents[split][1], two.documents[split][1])]

    def compare(self, name: str, other: str = REFERENCE) -> Comparison | None:
        """One arm against another, paired by seed; None where one of them is not there or no seed is in both."""
        arm, reference = self.arm(name), self.arm(other)
        if arm is None or reference is None:
            return None
        pairs = self._pairs(name, other, "test")
        seeds = [one.seed for one, _ in pairs]
        improvement = stats.probability_of_improvement([each.loss("test") for each in arm.seeds], [each.loss("test") for each in reference.seeds])
        for one, two, estimate in ((arm, reference, math.inf), (reference, arm, -math.inf)):
            if {each.seed for each in one.failures} & {each.seed for each in two.finished}:
                return Comparison(name, other, seeds, None, estimate, estimate, math.nan, improvement)
        if not pairs:
            return None
        ours, theirs = (np.array([each.documents["test"][0] for each in side]) for side in zip(*pairs, strict=True))
        tokens = pairs[0][0].documents["test"][1]
        interval = stats.compare(ours, theirs, tokens, self.method[0]) if len(pairs) > 1 else None
        by_seed = [(one.loss("test") - two.loss("test"), one.loss("validation") - two.loss("validation")) for one, two in pairs]
        table = stats.difference(ours, theirs, tokens)[1]
        return Comparison(
            name,
            other,
            seeds,
            interval,
            statistics.fmean(test for test, _ in by_seed),
            statistics.fmean(validation for _, validation in by_seed),
            statistics.stdev(test for test, _ in by_seed) if len(by_seed) > 1 else math.nan,
            improvement,
            math.sqrt(stats.components(table)[1] / table.shape[1]) if len(pairs) > 1 else math.nan,
        )

    def documents(self, name: str) -> int:
        """Documents of the test split that an arm was scored on; 0 where it finished no seed."""
        arm = self.arm(name)
        return next((len(each.documents["test"][0]) for each in arm.finished if "test" in each.documents), 0) if arm else 0

    @cached_property
    def against_baseline(self) -> list[Comparison]:
        """Every arm against the baseline, its p-values adjusted for their number."""
        return _adjusted([self.compare(arm.name) for arm in self.arms if arm.name != REFERENCE])

    @cached_property
    def questions(self) -> list[tuple[str, Comparison]]:
        """What the controls that are there answer; p-values adjusted for the number of controls, or of arms where the baseline is the control."""
        known = {(each.arm, each.reference): each for each in self.against_baseline}
        asked = [self.compare(arm, control) for _, arm, control in QUESTIONS if control != REFERENCE]
        known |= {(each.arm, each.reference): each for each in _adjusted(asked)}
        return [(question, known[arm, control]) for question, arm, control in QUESTIONS if (arm, control) in known]

    # -- time to target ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def target(self) -> float:
        """The baseline's mean final loss on validation, nats a token; NaN without one."""
        baseline = self.arm(REFERENCE)
        finals = [each.validation[-1] for each in baseline.finished if each.validation] if baseline else []
        return statistics.fmean(record.nats / record.tokens for record in finals) if finals else math.nan

    def to_target(self, name: str, axis: str = "flops") -> tuple[stats.Interval, int, int]:
        """How many times less than the baseline's whole cost an arm spent to reach the target; seeds that reached it, and all seeds."""
        arm, baseline = self.arm(name), self.arm(REFERENCE)
        assert arm is not None
        whole = baseline.mean(axis) if baseline else math.nan
        costs = [self._cost(each, axis) for each in arm.seeds]
        return stats.speed_up([whole] * len(costs), costs), sum(map(math.isfinite, costs)), len(costs)

    def _cost(self, scores: SeedScores, axis: str) -> float:
        records = scores.validation
        if scores.failed is not None or not records or math.isnan(self.target):
            return math.inf
        return stats.cost_to_target([getattr(record, axis) for record in records], [record.nats / record.tokens for record in records], self.target)

    @property
    def skipped_lines(self) -> int:
        """Lines of records that could not be read."""
        return sum(each.skipped_lines for arm in self.arms for each in arm.seeds)


def _adjusted(comparisons: Sequence[Comparison | None]) -> list[Comparison]:
    found = [each for each in comparisons if each is not None]
    tested = [each for each in found if each.interval is not None]
    adjusted = iter(stats.holm([each.interval.p for each in tested if each.interval is not None]))
    return [Comparison(**{**vars(each), "p_adjusted": next(adjusted) if each.interval is not None else math.nan}) for each in found]


# --------------------------------------------------------------------------------------------------------------------------------------
# Reading


def _seeds(arm: Path) -> list[SeedScores]:
    folders = [each for each in arm.glob("seed*") if each.name.removeprefix("seed").isdecimal() and any((each / f).exists() for f in ENDS)]
    return [_seed(each) for each in sorted(folders, key=lambda each: int(each.name.removeprefix("seed")))]


ENDS = ("result.json", FAILED)


def _seed(where: Path) -> SeedScores:
    seed = int(where.name.removeprefix("seed"))
    if not (where / "result.json").exists():
        return SeedScores(seed, where, None, failed=reason_of(where))
    result = read_result(where)
    evals, skipped = tolerant(where / "evals.jsonl", EvalRecord)
    failed = str(result["stopped"]) if result.get("stopped") else None
    if failed is None and None in (result["val_ppl"], result["test_ppl"]):
        failed = "its final loss is not finite"
    return SeedScores(seed, where, result, evals, _documents(where), failed, skipped)


def tolerant(path: Path, kind: type[Record]) -> tuple[list[Record], int]:
    """The records of a file and the number of lines that are not such records: cut off, damaged, or of another version."""
    records: list[Record] = []
    skipped = 0
    try:
        for record in read_lines(path, kind):
            if isinstance(record, DataError):
                skipped += 1
            else:
                records.append(record)
    except OSError:
        return records, skipped
    return records, skipped


def batches_of(scores: SeedScores) -> list[BatchRecord]:
    """The batch records of a seed that can be read."""
    return tolerant(scores.folder / "batches.jsonl", BatchRecord)[0]


def _documents(where: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Nats and tokens of every document.

    Raises:
        RunError: where the file is damaged.
    """
    file = where / "documents.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {split: (np.array(content[split]["nats"], dtype=float), np.array(content[split]["tokens"], dtype=float)) for split in SPLITS}
    except FileNotFoundError:
        return {}  # of a version that kept none
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as problem:
        raise RunError(f"{file} is damaged ({str(problem)[:200]}); delete its folder and train that arm again") from problem
    if any(nats.shape != tokens.shape or nats.ndim != 1 or not tokens.sum() > 0 for nats, tokens in found.values()):
        raise RunError(f"{file} is damaged; delete its folder and train that arm again")
    return found


def read_cells(run_dir: Path) -> list[CellScores]:
    """The cells of a study, in its order, or the one of a run.

    Raises:
        RunError: where there is nothing to report.
    """
    if not run_dir.is_dir():
        raise RunError(f"{run_dir} is not a folder; give the folder of a run or a comparison")
    if not (run_dir / STUDY).exists():
        order = folder.read_config(run_dir).get("strategies") if (run_dir / folder.CONFIG).exists() else None
        return [CellScores(run_dir, order=order if isinstance(order, list) else [])]
    cells = []
    for cell in from_json(run_dir / STUDY).cells:
        try:
            cells.append(CellScores(run_dir / cell.name, cell.name, [arm.name for arm in cell.arms]))
        except RunError as problem:
            if "nothing to report" not in str(problem):
                raise
    if not cells:
        raise RunError(f"{run_dir} has no finished arm; there is nothing to report yet")
    return cells
