"""The prefix sources of a run, one a text, over stores where ``--reuse epoch`` asks for them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iterbatch.config import SpeedConfig
from iterbatch.data.corpus import SPLITS
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.model.cut import CutModel
from iterbatch.model.sharded import whole
from iterbatch.reuse.prefix import PrefixSource
from iterbatch.reuse.store import DTYPES, ActivationStore, Layout, Warn, stores_folder
from iterbatch.runtime.processes import from_main, is_main


@dataclass(frozen=True)
class Texts:
    """The texts of a run, as their activations are kept.

    Args:
        items: Token ids of each block or window, by split.
        model_name: As ``iterbatch cache list`` shows it.
        titles: Of each split, likewise.
        computed_in: dtype of the model's arithmetic.
    """

    items: Mapping[str, Sequence[Any]]
    model_name: str
    titles: Mapping[str, str]
    computed_in: str

    def layouts(self, width: int, speed: SpeedConfig) -> dict[str, Layout]:
        """The room each text's activations get within ``--reuse_limit_gb``, the training text first.

        Args:
            width: Hidden size of the model.
            speed: Dtype and limit.

        Raises:
            ConfigError: where the limit has no room for a single block.
        """
        left, result = speed.reuse_limit_gb * 1e9, {}
        for split in SPLITS:  # in this order
            layout = Layout([len(item) for item in self.items[split]], width, speed.reuse_dtype, left)
            if split == "train" and not layout.capacity:
                raise ConfigError(
                    _(
                        "--reuse_limit_gb is {reuse_limit_gb:g}, less than one block ({offsets:.2g} GB); "
                        "all {count} take {offsets2:.2g} GB. Give more, or --reuse batch"
                    ).format(
                        reuse_limit_gb=speed.reuse_limit_gb,
                        offsets=layout.offsets[1] / 1e9,
                        count=len(layout.lengths),
                        offsets2=layout.offsets[-1] / 1e9,
                    )
                )
            result[split], left = layout, left - layout.bytes
        return result


class Reuse:
    """The prefix sources of a run, by split."""

    def __init__(self, sources: dict[str, PrefixSource]) -> None:
        self.sources = sources

    @property
    def stored_blocks(self) -> int:
        """How many training blocks are served from the second epoch on: the first so many."""
        store = self.sources["train"].store
        return 0 if store is None else store.capacity

    @property
    def store_gb(self) -> float:
        """Activations on disk for this run's texts, in GB."""
        stores = [source.store for source in self.sources.values() if source.store is not None]
        return sum(store.stored_bytes for store in stores) / 1e9

    def close(self) -> None:
        """Let go of the stores."""
        for source in self.sources.values():
            if source.store is not None:
                source.store.close()


@contextmanager
def open_reuse(
    texts: Texts, model: CutModel, device: torch.device, speed: SpeedConfig, warn: Warn
) -> Iterator[Reuse]:
    """Open what a run's configuration asks for.

    Without a prefix to reuse, or a folder to write to, say so and train without.
    """
    stores: dict[str, ActivationStore | None] = dict.fromkeys(SPLITS)
    kept_as = None
    if speed.reuse == "epoch":
        if model.cut == 0:
            warn(
                _(
                    "--reuse epoch: the lowest adapter is on layer 0, so there is no frozen prefix to "
                    "reuse; --lora_layers top:N makes one"
                )
            )
        else:
            stores, kept_as = _open_stores(texts, model, speed, warn), DTYPES[speed.reuse_dtype]
    reuse = Reuse({split: PrefixSource(model, device, store, kept_as) for split, store in stores.items()})
    try:
        yield reuse
    finally:
        reuse.close()


def _open_stores(
    texts: Texts, model: CutModel, speed: SpeedConfig, warn: Warn
) -> dict[str, ActivationStore | None]:
    shared = {
        "weights_sha256": weights_digest(model),
        "cut": model.cut,
        "dtype": speed.reuse_dtype,
        "computed_in": texts.computed_in,
        "compiled": speed.compile == "on",
        "device": next(model.parameters()).device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }
    stores: dict[str, ActivationStore | None] = {}
    for split, layout in texts.layouts(model.head.weight.shape[1], speed).items():
        key = {**shared, "tokens_sha256": tokens_digest(texts.items[split])}
        header = {
            "key": key,
            "model": texts.model_name,
            "text": texts.titles[split],
            "items": len(layout.lengths),
            "tokens": int(sum(layout.lengths)),
            "width": layout.width,
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        stores[split] = _open_store(stores_folder() / name, header, layout, warn) if layout.capacity else None
    return stores


def _open_store(folder: Path, header: dict[str, Any], layout: Layout, warn: Warn) -> ActivationStore | None:
    """The main process takes the lock; the others write where it may."""
    try:
        store = ActivationStore(folder, header, layout, warn) if is_main() else None
    except OSError as problem:
        warn(
            _(
                "the activation store {folder} cannot be used ({problem}); training continues without "
                "it, as with --reuse batch"
            ).format(folder=folder, problem=problem.strerror)
        )
        store = None
    writable = from_main(None if store is None else store.writable)
    if writable is None or is_main():
        return store
    return ActivationStore(folder, header, layout, warn, leader=False, writable=writable)


def weights_digest(model: CutModel) -> str:
    """SHA-256 over what the prefix activations depend on but the tokens: frozen weights, architecture."""
    config = {
        name: value
        for name, value in model.frozen.config.to_dict().items()
        if not name.startswith("_") and name != "transformers_version"
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.frozen.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(whole(value.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokens_digest(items: Sequence[Any]) -> str:
    """SHA-256 over the items' tokens and lengths."""
    digest = hashlib.sha256()
    for item in items:
        ids = np.asarray(item, dtype="<i8")
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return digest.hexdigest()
