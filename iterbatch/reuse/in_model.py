"""Prefix reuse inside a model that somebody else's loop trains: its layers below the lowest adapter run once.

The model goes on being called as before. Where the activations of all rows of a micro-batch are there, its
frozen layers let them through; else they are computed, by the same layers, and kept.

What does not live here: prefix reuse in our own loop, which cuts the model (:mod:`iterbatch.reuse.prefix`).
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.model.base import SUPPORTED

CACHES = BATCH, EPOCH = "batch", "epoch"
LOOKS_INSIDE = ("output_hidden_states", "output_attentions")  # a forward that does
NAME = "_iterbatch_prefix_reuse"  # the attribute of a decoder under which its reuse is found


def enable_prefix_reuse(
    model: Any, cache: str = BATCH, *, window: int = 1, folder: Path | None = None, limit_gb: float = 20.0
) -> PrefixReuse:
    """Have the frozen layers below a model's lowest adapter run once a batch, or once an epoch.

    Losses, gradients and what is trained stay as they are.

    Args:
        model: A ``PeftModel`` over the LLaMA layout, whose adapters are on its upper layers alone
            (``LoraConfig(layers_to_transform=[...])``).
        cache: ``batch``: the last ``window`` micro-batches are kept, for repeats of theirs. ``epoch``: every
            row is kept on disk, for repeats and for later epochs.
        window: Micro-batches of an update. A trainer with repeats sets it by itself.
        folder: Where ``epoch`` puts its file, which ends with the process; default: the system's own.
        limit_gb: Of that file. Rows beyond it are computed each time.

    Returns:
        What was computed and served, and a way to switch it off again.

    Raises:
        ConfigError: for another kind of model, and one whose prefix is not frozen or not always the same.
    """
    if cache not in CACHES:
        raise ConfigError(
            _("cache is '{cache}'; choose from {names}").format(cache=cache, names=", ".join(CACHES))
        )
    if reuse_of(model) is not None:
        raise ConfigError(_("this model reuses its prefix already; call its .disable() first"))
    decoder, cut = _decoder_and_cut(model)
    kept: Kept = LastMicroBatches() if cache == BATCH else RowsOnDisk(folder, limit_gb)
    reuse = PrefixReuse(decoder, cut, kept, window)
    setattr(decoder, NAME, reuse)
    return reuse


def reuse_of(model: Any) -> PrefixReuse | None:
    """The reuse that was enabled for a model, if any."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(getattr(causal, "model", None), NAME, None)


def _decoder_and_cut(model: Any) -> tuple[Any, int]:
    """The decoder of a model, and how many layers lie below its lowest adapter.

    Raises:
        ConfigError: where there is nothing to reuse, or it would change.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else None
    decoder: Any = getattr(causal, "model", None)
    layers, kind = getattr(decoder, "layers", None), getattr(getattr(model, "config", None), "model_type", "")
    if kind not in SUPPORTED or not isinstance(layers, nn.ModuleList):
        name = f"{type(model).__name__} ({kind})" if kind else type(model).__name__
        raise ConfigError(
            _("prefix reuse needs a PeftModel over the LLaMA layout ({names}); this is a {name}").format(
                names=", ".join(SUPPORTED), name=name
            )
        )
    trained = [any(each.requires_grad for each in layer.parameters()) for layer in layers]
    cut = trained.index(True) if True in trained else len(layers)
    if cut in (0, len(layers)):
        what = _("layer 0 has an adapter") if cut == 0 else _("no layer has an adapter")
        raise ConfigError(
            _(
                "there is no frozen prefix to reuse: {what}. Put adapters on the upper layers alone, by "
                "LoraConfig(layers_to_transform=[...])"
            ).format(what=what)
        )
    if any(each.requires_grad for each in decoder.embed_tokens.parameters()):
        raise ConfigError(_("the embedding is trained, so what the prefix gives changes with every update"))
    parts = [part for layer in layers[:cut] for part in layer.modules()]
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts):
        raise ConfigError(_("a frozen layer has dropout, so what the prefix gives is another each time"))
    if getattr(decoder.config, "attention_dropout", 0.0):
        raise ConfigError(_("attention_dropout is above 0, so what the prefix gives is another each time"))
    return decoder, cut


# ------------------------------------------------------------------------------------------------------------
# What is kept


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch, each up to its last token: padding behind it is seen by nothing."""

    keys: list[bytes]  # digests of what their activations depend on: tokens, mask, positions, precision
    lengths: list[int]

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Rows:
        """From (rows, length) tensors as Transformers takes them; positions may have one row for all."""
        tokens, count = ids.cpu().numpy(), ids.shape[1]
        seen = np.ones_like(tokens) if mask is None else mask.cpu().numpy().astype(tokens.dtype)
        at = np.broadcast_to(np.arange(count) if positions is None else positions.cpu().numpy(), tokens.shape)
        lengths = [int(np.flatnonzero(row).max(initial=-1)) + 1 for row in seen]
        kind = ids.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        keys = [
            hashlib.blake2b(
                b"".join([str(cast).encode(), *(each[row, :length].tobytes() for each in (tokens, seen, at))])
            ).digest()
            for row, length in enumerate(lengths)
        ]
        return cls(keys, lengths)


class Kept(Protocol):
    """Activations that were computed."""

    def get(self, rows: Rows, like: Tensor) -> Tensor | None:
        """Those of a micro-batch, of the shape and device of ``like``; None where a row is missing."""
        ...

    def put(self, rows: Rows, hidden: Tensor, window: int) -> None:
        """Keep those of a micro-batch, as one of ``window``."""
        ...


class LastMicroBatches:
    """The last micro-batches as they were, on their device."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, ...], Tensor] = OrderedDict()

    def get(self, rows: Rows, like: Tensor) -> Tensor | None:
        """That of the very same rows, padded alike."""
        found = self._kept.get(key := (*rows.keys,))
        if found is None or found.shape != like.shape:
            return None
        self._kept.move_to_end(key)
        return found

    def put(self, rows: Rows, hidden: Tensor, window: int) -> None:
        """Keep it, and let the oldest go."""
        self._kept[(*rows.keys,)] = hidden
        while len(self._kept) > window:
            self._kept.popitem(last=False)


class RowsOnDisk:
    """Every row's activations once, in a file without a name that ends with the process.

    Args:
        folder: Where it lies; None: the system's own for such files.
        limit_gb: Rows that would make it larger are not kept.
    """

    def __init__(self, folder: Path | None, limit_gb: float) -> None:
        # Not buffered: a full disk is known where a row is written, and only there.
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._limit, self._end = limit_gb * 1e9, 0
        self._at: dict[bytes, tuple[int, int]] = {}  # where each row begins, and how many bytes it has
        self._dtype = torch.float32

    def get(self, rows: Rows, like: Tensor) -> Tensor | None:
        """All rows, with nothing where there is padding behind them."""
        if not all(key in self._at for key in rows.keys):
            return None
        found = torch.zeros(like.shape, dtype=self._dtype)
        for row, (key, length) in enumerate(zip(rows.keys, rows.lengths, strict=True)):
            start, size = self._at[key]
            self._file.seek(start)
            content = bytearray(size)
            left = memoryview(content)
            while left and (read := self._file.readinto(left)):
                left = left[read:]
            if left:
                return None
            found[row, :length] = torch.frombuffer(content, dtype=self._dtype).view(length, -1)
        return found.to(like.device)

    def put(self, rows: Rows, hidden: Tensor, window: int) -> None:
        """Append those that are new, while there is room."""
        on_host, self._dtype = hidden.detach().to("cpu"), hidden.dtype
        for row, (key, length) in enumerate(zip(rows.keys, rows.lengths, strict=True)):
            if key in self._at:
                continue
            content = on_host[row, :length].contiguous().view(torch.uint8).numpy()
            if self._end + content.nbytes > self._limit:
                continue
            try:
                self._file.seek(self._end)
                left = memoryview(content.data).cast("B")
                while left:
                    left = left[self._file.write(left) :]
            except OSError as problem:  # a full disk: what is there is served, the rest computed
                self._limit = self._end
                warnings.warn(
                    _("no more activations are kept: {problem}").format(problem=problem), stacklevel=2
                )
                return
            self._at[key] = (self._end, content.nbytes)
            self._end += content.nbytes


# ------------------------------------------------------------------------------------------------------------
# The model


def checkpoints(layer: Any) -> bool:
    """Whether a layer's activations are computed anew in the backward pass."""
    return bool(getattr(layer, "gradient_checkpointing", False))


class PrefixReuse:
    """The frozen layers of one decoder, and what they gave.

    Attributes:
        rows_computed: Rows that went through the frozen layers while training.
        rows_served: Rows that did not need to.
        window: Micro-batches of an update.
    """

    def __init__(self, decoder: Any, cut: int, kept: Kept, window: int) -> None:
        self.rows_computed, self.rows_served, self.window = 0, 0, window
        self._decoder, self._kept, self._computed = decoder, kept, list[tuple[int, int]]()
        self._layers = list(decoder.layers[:cut])
        self._rows: Rows | None = None  # of the current forward, where it is one to reuse
        self._served = False  # whether they are there
        self._hooks = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
        ]
        self._before = [(layer.__dict__.get("forward"), checkpoints(layer)) for layer in self._layers]
        for number, layer in enumerate(self._layers):
            layer.forward = self._instead(layer.forward, number)

    def disable(self) -> None:
        """Have the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for layer, (forward, checkpointed) in zip(self._layers, self._before, strict=True):
            del layer.forward  # the class's own again
            if forward is not None:
                layer.forward = forward
            layer.gradient_checkpointing = checkpointed or any(map(checkpoints, self._decoder.layers))
        self._layers = []
        delattr(self._decoder, NAME)

    def take_computed(self) -> list[tuple[int, int]]:
        """(rows, length) of the micro-batches that were computed since this was asked last."""
        taken, self._computed = self._computed, []
        return taken

    def _begin(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins: one to reuse is that of training, on tokens alone."""
        self._rows = None
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        inside = any(kwargs.get(name) or getattr(decoder.config, name, False) for name in LOOKS_INSIDE)
        if not decoder.training or ids is None or inside or kwargs.get("past_key_values") is not None:
            return
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            return
        if getattr(decoder.embed_tokens, "neftune_noise_alpha", None):
            raise ConfigError(
                _("neftune_noise_alpha makes the prefix another each time; leave one of the two out")
            )
        for layer in self._layers:
            layer.gradient_checkpointing = False  # without a gradient there is nothing to recompute
        self._rows = Rows.of(ids, mask, kwargs.get("position_ids"))

    def _end(self, *_: Any) -> None:
        self._rows = None

    def _instead(self, compute: Callable[..., Any], number: int) -> Callable[..., Any]:
        """What a frozen layer does: nothing, where its micro-batch is served."""
        last = number == len(self._layers) - 1

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self._rows
            if rows is None:
                return compute(hidden, *args, **kwargs)
            if number == 0:
                found = self._kept.get(rows, hidden)
                self._served = found is not None
                if found is not None:
                    self.rows_served += len(rows.keys)
                    # With checkpointing Transformers has the embedding ask for a gradient.
                    return found.detach().requires_grad_(hidden.requires_grad)
            if self._served:
                return hidden
            wants = hidden.requires_grad
            with torch.no_grad():
                hidden = compute(hidden, *args, **kwargs)
            if last:
                self._kept.put(rows, hidden, self.window)
                self.rows_computed += len(rows.keys)
                self._computed.append((hidden.shape[0], hidden.shape[1]))
            return hidden.detach().requires_grad_(wants)

        return forward
