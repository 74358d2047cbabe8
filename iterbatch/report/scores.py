"""What an arm's records say: its batches, its evaluations, and how it ended, seed by seed."""

import math
import statistics
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from iterbatch.errors import DataError, RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.read import DocumentScores, failure_of, read_documents
from iterbatch.records.record import BatchRecord, EvalRecord, read_lines, tolerant
from iterbatch.records.result import ArmResult, ArmSettings, check_records, read_result
from iterbatch.records.seal import ADVICE
from iterbatch.strategy import STRATEGIES

Figure = Callable[[ArmResult], float | None]


class Batches:
    """The batches of a seed, a few numbers each, so that a million of them fit into memory.

    Args:
        file: Of their records; those that cannot be read are left out.
    """

    def __init__(self, file: Path) -> None:
        losses, passes, received, planned = array("d"), array("q"), array("q"), array("q")
        # By pass: sum over batches of the loss before it, minus the initial loss.
        self.falls: list[float] = []
        self.fallen: list[int] = []  # by pass: how many batches that are, those with one pass left out
        for record in read_lines(file, BatchRecord) if file.exists() else ():
            if isinstance(record, DataError):
                continue
            losses.append(record.initial_loss)
            passes.append(record.repeats_done)
            received.append(record.repeats_done + len(record.revisited))
            planned.append(record.repeats_planned)
            if len(record.losses) > 1:
                self._fall(record.losses)
        self.losses = np.array(losses)  # (batches,) initial loss, nats a token
        self.passes = np.array(passes)  # (batches,) of the batch itself
        self.received = np.array(received)  # (batches,) made while it was the current one
        self.planned = np.array(planned)  # (batches,) that its strategy asked for

    def _fall(self, losses: list[float]) -> None:
        new = [0] * (len(losses) - len(self.falls))
        self.falls += map(float, new)
        self.fallen += new
        for place, loss in enumerate(losses):
            self.falls[place] += loss - losses[0]
            self.fallen[place] += 1


@dataclass(frozen=True)
class SeedScores:
    """One arm with one seed."""

    seed: int
    folder: Path
    result: ArmResult | None  # None where the pair crashed
    evals: list[EvalRecord] = field(default_factory=list)
    documents: DocumentScores = field(default_factory=dict)
    failed: str | None = None  # why: it crashed, or diverged
    skipped_lines: int = 0  # of its records, that could not be read

    @property
    def validation(self) -> list[EvalRecord]:
        """Evaluations of the validation split, in order."""
        return [record for record in self.evals if record.split == "validation"]

    @cached_property
    def batches(self) -> Batches:
        """Its batches."""
        return Batches(self.folder / layout.BATCHES)

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
    kind: str  # a key of STRATEGIES, or of those of the version that trained it
    seeds: list[SeedScores]

    @property
    def finished(self) -> list[SeedScores]:
        """Seeds that did not fail."""
        return [each for each in self.seeds if each.failed is None]

    @property
    def failures(self) -> list[SeedScores]:
        """Seeds that crashed or diverged."""
        return [each for each in self.seeds if each.failed is not None]

    def values(self, figure: Figure) -> list[float]:
        """A figure of the results, of each finished seed that has it."""
        found = [figure(each.result) for each in self.finished if each.result is not None]
        return [float(value) for value in found if value is not None and math.isfinite(value)]

    def mean(self, figure: Figure) -> float:
        """Mean over finished seeds; NaN where there is none."""
        values = self.values(figure)
        return statistics.fmean(values) if values else math.nan

    @property
    def settings(self) -> ArmSettings | None:
        """What it was; None where no result says so."""
        return next((each.result.arm for each in self.seeds if each.result and each.result.arm), None)

    @property
    def budget_share(self) -> float:
        """Of its budget, in the cell's: not 1 for a baseline that says what compute is worth."""
        return self.settings.budget_share if self.settings else 1.0

    @property
    def rate(self) -> float:
        """Its learning rate; NaN where no result says it."""
        return self.settings.lr if self.settings else math.nan

    @cached_property
    def alike(self) -> str:
        """Where a strategy that means to adapt treated all batches alike: what it saw, what would help."""
        kind = STRATEGIES.get(self.kind)
        batches = [each.batches for each in self.finished]
        planned = {int(passes) for each in batches for passes in np.unique(each.planned)}
        if kind is None or not kind.adapts or len(planned) != 1:
            return ""
        losses = np.concatenate([each.losses[np.isfinite(each.losses)] for each in batches])
        (passes,) = planned
        times = (
            _("repeated no batch")
            if passes == 1
            else _("gave every batch {passes} passes alike").format(passes=passes)
        )
        if passes > 1 and all((each.received == 1).all() for each in batches):
            return _(
                "{name} meant to give every batch {passes} passes, and made no repeat: the budget paid for "
                "none, or none was due before it was spent."
            ).format(name=self.name, passes=passes)
        saw = _("{name} {times}: their initial losses lay between {min:.2f} and {max:.2f}").format(
            name=self.name, times=times, min=losses.min(), max=losses.max()
        )
        advice = kind.advice(losses.tolist()) if len(losses) else ""
        return f"{saw}. {advice}".rstrip(". ") + "."

    def text(self, decoding: str, metric: str) -> list[float]:
        """A metric of the written text, of each finished seed that has it."""
        return self.values(lambda result: result.text.get(decoding, {}).get(metric))


def read_arms(run_dir: Path, kinds: Mapping[str, str]) -> list[ArmScores]:
    """The arms of a run, or of a cell of a study.

    Args:
        run_dir: Its folder.
        kinds: Of its arms, by name and in their order; of those not named: what their results say.

    Raises:
        RunError: where a record that is needed is damaged.
    """
    arms: dict[str, list[SeedScores]] = {}
    for arm, seed, folder in layout.ended_folders(run_dir):
        arms.setdefault(arm, []).append(_seed(seed, folder))
    places = {arm: place for place, arm in enumerate(kinds)}
    names = sorted(arms, key=lambda arm: places.get(arm, len(places)))
    return [ArmScores(arm, kinds.get(arm) or _kind(arm, arms[arm]), arms[arm]) for arm in names]


def _kind(name: str, seeds: Sequence[SeedScores]) -> str:
    return next((each.result.kind for each in seeds if each.result is not None), name)


def _seed(seed: int, folder: Path) -> SeedScores:
    if not (folder / layout.RESULT).exists():
        return SeedScores(seed, folder, None, failed=failure_of(folder))
    result = read_result(folder)
    check_records(folder)
    evals, skipped = tolerant(folder / layout.EVALS, EvalRecord)
    failed = result.stopped or None
    if failed is None and not result.finite:
        failed = _("its final loss is not finite")
    documents = read_documents(folder)
    if result.finite:
        _check_alike(folder, result, evals, documents)
    return SeedScores(seed, folder, result, evals, documents, failed, skipped)


def _check_alike(
    folder: Path, result: ArmResult, evals: Sequence[EvalRecord], documents: DocumentScores
) -> None:
    """See that a result, its evaluations and its documents tell of the same losses.

    Raises:
        RunError: naming what does not.
    """
    if any(record.tokens <= 0 for record in evals):
        raise RunError(
            _("{folder} has an evaluation of no tokens; {advice}").format(
                folder=folder / layout.EVALS, advice=_(ADVICE)
            )
        )
    told = {
        split: math.log(ppl) for split, ppl in (("validation", result.val_ppl), ("test", result.test_ppl))
    }
    by_document = {split: nats.sum() / tokens.sum() for split, (nats, tokens) in documents.items()}
    tests = [record for record in evals if record.split == "test"]
    by_evaluation = {"test": tests[-1].nats / tests[-1].tokens} if tests else {}
    for file, losses in ((layout.DOCUMENTS, by_document), (layout.EVALS, by_evaluation)):
        for split, loss in losses.items():
            if not math.isclose(loss, told[split], rel_tol=1e-6, abs_tol=1e-9):
                losses_told = _("{loss:.6f} and {told:.6f} nats a token on {split}").format(
                    loss=loss, told=told[split], split=split
                )
                raise RunError(
                    _("{folder} and {result} do not agree: {losses_told}; {advice}").format(
                        folder=folder / file, result=layout.RESULT, losses_told=losses_told, advice=_(ADVICE)
                    )
                )
