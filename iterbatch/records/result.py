"""The result of one arm with one seed: written when it ends, read and checked here and nowhere else."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout, seal
from iterbatch.records.write import write_json

DECODINGS = ("greedy", "sampled")
TextMetrics = Mapping[str, Mapping[str, float]]  # decoding to metric to value
TEXT_METRICS = ("distinct_1", "distinct_2", "rep_4", "mean_length")  # that every text has


@dataclass(frozen=True)
class ArmSettings:
    """What an arm was."""

    strategy: str
    source: str | None  # the arm whose passes it was made from
    lr: float  # peak learning rate
    budget_share: float = 1.0  # of its budget, in the cell's


@dataclass(frozen=True)
class GroupLoss:
    """Some training blocks after training; numbers are None where there are no such blocks."""

    blocks: int
    passes: float | None  # mean
    loss: float | None  # nats a token
    base_loss: float | None  # the untrained base's


@dataclass(frozen=True)
class ArmResult:
    """What one arm with one seed reached, and what it spent. Counters are those of its ledger.

    A perplexity that was not finite is infinity. Versions before 0.1 left some fields out: those
    have defaults.
    """

    strategy: str  # the arm's name
    seed: int
    val_ppl: float
    test_ppl: float
    val_word_ppl: float = math.nan
    bits_per_byte: float = math.nan  # of validation
    batches: int = 0
    updates: int = 0
    mean_repeats: float = math.nan  # passes a batch
    tokens_unique: int = 0
    tokens_trained: int = 0
    flops: float = 0.0
    train_seconds: float = 0.0
    tokens_per_second: float = math.nan
    peak_memory_mb: float = math.nan
    test_word_ppl: float = math.nan
    test_bits_per_byte: float = math.nan
    base_val_ppl: float = math.nan
    flops_fresh: float = 0.0
    flops_repeat: float = 0.0
    flops_probe: float = 0.0
    flops_saved: float = 0.0
    seconds_saved: float = 0.0
    seconds_charged: float = 0.0
    store_gb: float = 0.0  # activations on disk for the run's texts
    skipped_updates: int = 0
    nonfinite_losses: int = 0
    nonfinite_gradients: int = 0
    scaler_skips: int = 0
    rollbacks: int = 0
    flops_lost: float = 0.0
    processes: int = 0  # that shared its batches when it ended; 0: not recorded
    arm: ArmSettings | None = None
    memorised: Mapping[str, GroupLoss] | None = None  # of the groups all, most and least
    text: TextMetrics = field(default_factory=dict)
    base_text: TextMetrics = field(default_factory=dict)
    stopped: str | None = None  # why it ended before its budget was spent

    @property
    def finite(self) -> bool:
        """Whether both perplexities are."""
        return math.isfinite(self.val_ppl) and math.isfinite(self.test_ppl)

    @property
    def kind(self) -> str:
        """A key of ``STRATEGIES``; earlier versions kept only the arm's name."""
        return self.arm.strategy if self.arm is not None else self.strategy

    def write(self, folder: Path) -> None:
        """Write it into the folder of its arm and seed, with digests of its records there."""
        write_json(folder / layout.RESULT, seal.sealed(dataclasses.asdict(self), folder))


NUMBERS = {each.name for each in dataclasses.fields(ArmResult) if each.type in (int, float)} - {"seed"}
NEEDED = ("batches", "updates", "mean_repeats", "flops", "train_seconds", "skipped_updates")
PERPLEXITIES = ("val_ppl", "test_ppl", "base_val_ppl")  # null where not finite


def read_result(folder: Path) -> ArmResult:
    """The result in the folder of an arm and seed; the folder's names count, not what the result says.

    Raises:
        RunError: where it cannot be read, or is not as it was written.
    """
    file = folder / layout.RESULT
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        seal.check(row)
        return result_of(row, folder.parent.name, layout.seed_of(folder) or 0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise RunError(
            _("{file} is damaged ({problem}); {advice}").format(
                file=file, problem=problem, advice=_(seal.ADVICE)
            )
        ) from problem


def check_records(folder: Path) -> None:
    """Compare the records of an arm and seed with the digests in its result.

    Raises:
        RunError: naming the file that was changed.
    """
    seal.check_records(json.loads((folder / layout.RESULT).read_text(encoding="utf-8")), folder)


def result_of(row: Mapping[str, Any], arm: str, seed: int) -> ArmResult:
    """A result from what JSON holds.

    Raises:
        ValueError: where a value is not what it should be; TypeError and KeyError likewise.
    """
    fields: dict[str, Any] = {}
    for name in (*NEEDED, *PERPLEXITIES, *NUMBERS.intersection(row)):
        value = row[name]
        if value is None and name not in NEEDED:
            value = math.inf if name in PERPLEXITIES else math.nan
        if not _is_number(value):
            raise ValueError(f"{name} is {value!r}")
        fields[name] = value
    for name in ("flops", "tokens_trained", "tokens_unique"):
        if fields["batches"] and not fields.get(name, 1) > 0:
            raise ValueError(
                _("{name} is {fields!r} after {batches} batches").format(
                    name=name, fields=fields[name], batches=fields["batches"]
                )
            )
    fields["text"] = _text_metrics("text", row["text"])
    if "base_text" in row:  # earlier versions kept none
        fields["base_text"] = _text_metrics("base_text", row["base_text"])
    settings, memorised, stopped = row.get("arm"), row.get("memorised"), row.get("stopped")
    return ArmResult(
        strategy=arm,
        seed=seed,
        **fields,
        arm=None if settings is None else _settings(settings),
        memorised=None
        if memorised is None
        else {name: GroupLoss(**group) for name, group in memorised.items()},
        stopped=None if stopped is None else str(stopped),
    )


def _settings(content: Mapping[str, Any]) -> ArmSettings:
    source = content["source"]
    return ArmSettings(
        str(content["strategy"]),
        None if source is None else str(source),
        float(content["lr"]),
        float(content.get("budget_share", 1.0)),
    )


def _text_metrics(name: str, content: Any) -> TextMetrics:
    for decoding in DECODINGS:
        if not all(_is_number(content[decoding][metric]) for metric in TEXT_METRICS):
            raise ValueError(_("{name} has a metric that is no number").format(name=name))
    return {
        decoding: {metric: float(value) for metric, value in content[decoding].items()}
        for decoding in DECODINGS
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
