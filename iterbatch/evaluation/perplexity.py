"""Perplexity, sum over sum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from iterbatch.data.windows import EvalText, collate
from iterbatch.model.cut import CutModel
from iterbatch.reuse.prefix import PrefixSource

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Score:
    """Sums over a text, and the figures that follow from them.

    Words and bytes are those of the text's source.
    """

    nats: float
    tokens: int
    words: int
    bytes: int
    document_nats: list[float] = field(default_factory=list)
    document_tokens: list[int] = field(default_factory=list)
    end_nats: float = 0.0  # of the nats, on the ends of documents, which have neither words nor bytes

    @property
    def ppl(self) -> float:
        """Token perplexity, exp(nats / tokens)."""
        return _exp(self.nats / self.tokens)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Of the perplexity, over documents: ratio estimator, Student's t; NaN with fewer than two."""
        nats, tokens = np.array(self.document_nats), np.array(self.document_tokens)
        count, loss = len(tokens), self.nats / self.tokens
        if count < 2:
            return math.nan, math.nan
        error = math.sqrt(float(((nats - loss * tokens) ** 2).sum()) * count / (count - 1)) / self.tokens
        reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
        return _exp(loss - reach), _exp(loss + reach)

    @property
    def word_ppl(self) -> float:
        """Word perplexity, exp(nats / words): comparable between tokenizers.

        Without the ends of documents, which are no words.
        """
        return _exp((self.nats - self.end_nats) / self.words)

    @property
    def byte_ppl(self) -> float:
        """Byte perplexity, exp(nats / bytes), likewise."""
        return _exp((self.nats - self.end_nats) / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte, nats / bytes / ln 2, likewise."""
        return (self.nats - self.end_nats) / self.bytes / math.log(2)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def score(
    model: CutModel,
    text: EvalText,
    accelerator: Accelerator,
    *,
    source: PrefixSource | None = None,  # of this text; default: without a store
    batch_size: int = 8,  # windows scored together
    pad_id: int = 0,
    padding_side: str = "right",
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Score every token of a text once, in eval mode, without gradients.

    The result does not depend on ``batch_size`` or ``padding_side``: windows are independent and
    padding is never attended to.

    Args:
        model: A :class:`iterbatch.model.cut.CutModel`, not distributed: processes may do different
            numbers of forwards. Of a sharded one all do as many.
        text: Its windows are split over the processes.
        accelerator: Places, casts and reduces.
        source: Of the text's prefix activations.
        batch_size: Windows scored together.
        pad_id: Token that fills up short windows.
        padding_side: ``right``, or ``left`` where no activations are to be kept.
        between: Called between two groups of windows, where a run may be stopped.
    """
    source = source or PrefixSource(model, accelerator.device)
    training = model.training
    model.eval()
    # Longest first: windows of like length share a batch, and a batch too large for memory fails at once.
    order = sorted(range(len(text.windows)), key=lambda index: -len(text.windows[index].input_ids))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # One sum a document, because comparisons resample documents, and a last one for the ends of all.
    nats = torch.zeros(
        text.documents + 1,
        dtype=torch.float64,
        device=accelerator.device if accelerator.device.type != "mps" else "cpu",
    )
    for group, counts in _shares(groups, accelerator, together=model.sharded):
        between()
        micro = collate([text.windows[index] for index in group], pad_id, padding_side)
        if padding_side == "right":  # what stands left of a window would change what is kept of it
            micro = dataclasses.replace(micro, blocks=tuple(group) if counts else ())
        with torch.no_grad(), accelerator.autocast():
            micro = micro.to(accelerator.device)
            losses = model(source.fetch(micro)[0], micro).to(nats.device, torch.float64)
        source.settle()
        if not counts:
            continue
        windows = [text.windows[index] for index in group]
        documents = torch.tensor([window.document for window in windows], device=nats.device)
        nats.index_add_(0, documents, losses.sum(dim=1))
        for row, window in enumerate(windows):
            if window.ends:
                last = len(window.input_ids) if padding_side == "right" else losses.shape[1]
                nats[-1] += losses[row, last - 1]
    model.train(training)
    reduced: Any = accelerator.reduce(nats, "sum")
    *by_document, ends = reduced.tolist()
    return Score(
        math.fsum(by_document), text.tokens, text.words, text.bytes, by_document, text.document_tokens, ends
    )


def _shares(
    groups: list[list[int]], accelerator: Accelerator, *, together: bool
) -> Iterator[tuple[list[int], bool]]:
    """The groups that this process scores; ``together``: and others for company, which count elsewhere."""
    rank, world = accelerator.process_index, accelerator.num_processes
    for start in range(0, len(groups), world):
        if start + rank < len(groups):
            yield groups[start + rank], True
        elif together:
            yield groups[start], False
