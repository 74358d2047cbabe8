"""Model and text checked and made ready, and what a run will cost, before anything is trained."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iterbatch.config import AUTO, NONE, BenchConfig, LossOn
from iterbatch.data import hub
from iterbatch.data.blocks import Blocks, prepare_blocks
from iterbatch.data.chat import Writer
from iterbatch.data.corpus import NAMED, Corpus, Reading, read_corpus, unreachable_dataset
from iterbatch.data.data_loader import BatchStream, set_aside
from iterbatch.data.windows import EvalText, prepare_eval
from iterbatch.errors import ConfigError, UserError
from iterbatch.language import _
from iterbatch.model.base import ADAPTER, Base, base_digests, load_base
from iterbatch.model.flops import flop_model, memory_estimate_mb
from iterbatch.model.lora import adapted_layers
from iterbatch.model.weights import load_model
from iterbatch.records.origin import Origin
from iterbatch.records.scored import Scored
from iterbatch.reuse.run_stores import Texts
from iterbatch.runtime.processes import count
from iterbatch.strategy.own import SOURCES

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Prepared:
    """Text and tokenizer, ready; no weights yet."""

    config: BenchConfig
    base: Base
    corpus: Corpus
    blocks: Blocks  # of the training text
    aside: np.ndarray  # which of them are probe text, never trained on
    texts: dict[str, EvalText]  # validation and test

    @cached_property
    def origin(self) -> Origin:
        """Digests of all that training starts from."""
        own = {name: source.digest for name, source in SOURCES.items()}
        return Origin(self.corpus.digests(), *base_digests(self.base), own)

    @property
    def notes(self) -> list[str]:
        """What the reader must be told of the text."""
        source = self.corpus.source
        notes = [note if note.startswith(str(source)) else f"{source}: {note}" for note in self.corpus.notes]
        notes += [self.blocks.note] if self.blocks.note else []
        if (Path(self.base.path) / ADAPTER).is_file():
            notes.append(
                _("{path}: an adapter lies beside the base; it is not used").format(path=self.base.path)
            )
        for split, text in self.texts.items():
            if text.cut:
                notes.append(
                    _("{source}: the last document of {split} is cut at --max_eval_tokens").format(
                        source=source, split=split
                    )
                )
            if (caution := text.counts.caution(split)) is not None:
                notes.append(f"{source}: {caution}")
        return notes

    @property
    def trained_blocks(self) -> int:
        """How many blocks are trained on."""
        return len(self.blocks) - len(self.aside)

    @property
    def keeps_activations(self) -> bool:
        """Whether prefix activations are to be kept on disk, and there is a prefix."""
        lowest = adapted_layers(self.config.model.lora_layers, self.base.layers)[0]
        return self.config.speed.reuse == "epoch" and lowest > 0

    @property
    def kept_texts(self) -> Texts:
        """The texts as their activations are kept."""
        config, windows = self.config, {split: text.windows for split, text in self.texts.items()}
        items: dict[str, Any] = {split: [each.input_ids for each in of] for split, of in windows.items()}
        items["train"] = self.blocks.ids
        named = config.data.data_dir is None
        titles = {split: f"{config.data.dataset}, {split}" if named else split for split in items}
        return Texts(items, Path(config.model.model_name).name, titles, self.base.dtype)


def prepare(config: BenchConfig) -> Prepared:
    """Check the model and the text, and cut the text into blocks.

    Raises:
        UserError: with every problem that can be known before long work.
    """
    base, problems = None, _tracker_problems(config)
    try:
        base = load_base(config)
    except UserError as problem:
        problems.append(str(problem))
    if (problem := _dataset_problem(config)) is not None:
        problems.append(problem)
    if problems or base is None:
        raise ConfigError("\n".join(problems))
    tokenizer, data = base.tokenizer, config.data
    writer = Writer(tokenizer, data.loss_on, keep_special=data.special_tokens_in_text == "keep")
    reading = Reading(writer, data.encoding, data.text_field)
    corpus = read_corpus(
        data.dataset, dataset_config=data.dataset_config, data_dir=data.data_dir, reading=reading
    )
    length, key = config.max_length, corpus.digest()
    blocks = prepare_blocks(corpus.splits["train"], tokenizer, length, config.max_train_tokens, data_key=key)
    texts = {
        split: prepare_eval(corpus.splits[split], tokenizer, length, data.max_eval_tokens)
        for split in ("validation", "test")
    }
    aside = set_aside(len(blocks), data.probe_text)  # says whether the text has room for it
    prepared = Prepared(config, base, corpus, blocks, aside, texts)
    if prepared.keeps_activations:
        prepared.kept_texts.layouts(
            base.config.hidden_size, config.speed
        )  # says whether the limit has room for a block
    return prepared


def trackers(names: Sequence[str]) -> list[str]:
    """What ``--log_with`` stands for, as Accelerate names it: none, or those given.

    Auto where it is installed.
    """
    chosen = [name for name in names if name not in (AUTO, NONE)]
    auto = AUTO in names and importlib.util.find_spec("tensorboard") is not None
    return [*chosen, *(["tensorboard"] if auto and "tensorboard" not in chosen else [])]


def _tracker_problems(config: BenchConfig) -> list[str]:
    return [
        _("--log_with {name} needs its package: pip install {name}").format(name=name)
        for name in trackers(config.run.log_with)
        if importlib.util.find_spec(name) is None
    ]


def _dataset_problem(config: BenchConfig) -> str | None:
    """A word with the hub where the text comes from there; the text itself is read later."""
    known = NAMED.get(config.data.dataset)
    name = known.name if known else config.data.dataset
    if config.data.data_dir is not None or "/" not in name or hub.dataset_in_cache(name):
        return None
    problem = hub.problem_with(name, "dataset")
    return None if problem is None else unreachable_dataset(name, problem)


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before anything is trained. Counts are of one baseline arm."""

    batches: int
    tokens: int  # label tokens
    flops: float
    last_pass_flops: float  # the least its last pass may cost
    blocks: int
    max_length: int
    documents: int  # of the training text
    loss_on: dict[LossOn, int]  # documents, of all splits, by what the loss is on
    scored: dict[str, Scored]
    without_loss: dict[str, int]  # tokens of the scored documents that the loss is not on
    trainable_parameters: int
    parameters: int
    memory_mb: float
    price_ratio: float
    seconds: float = math.nan  # of training an arm on this machine, estimated where that was asked for


def make_plan(prepared: Prepared, model: PeftModel, processes: int = 1, stored_blocks: int = 0) -> Plan:
    """Count what a baseline arm will do and cost.

    Args:
        prepared: Text and tokenizer.
        model: With its adapters; weights are not needed.
        processes: That share each batch.
        stored_blocks: Training blocks whose prefix activations are kept after the first epoch.
    """
    config = prepared.config
    stream = make_stream(prepared, seed=0, rank=0, world=processes)
    flops, blocks, epochs = (
        flop_model(model, config.model.gradient_checkpointing),
        prepared.trained_blocks,
        config.training.epochs,
    )
    tokens = int(np.delete(prepared.blocks.label_tokens(), prepared.aside).sum())
    epoch_flops = flops.fresh([(blocks, config.max_length)])
    saved = flops.prefix.of([(min(stored_blocks, blocks), config.max_length)])
    last_shape = [((blocks - 1) % stream.batch_rows + 1, config.max_length)]
    reused = config.speed.reuse != "off"
    return Plan(
        batches=stream.batches_per_epoch * epochs,
        tokens=tokens * epochs,
        flops=epoch_flops * epochs - saved * (epochs - 1),
        last_pass_flops=flops.repeat(last_shape) if stored_blocks and epochs > 1 else flops.fresh(last_shape),
        blocks=blocks,
        max_length=config.max_length,
        documents=prepared.corpus.splits["train"].documents,
        loss_on=dict(prepared.corpus.loss_on),
        scored={split: text.counts for split, text in prepared.texts.items()},
        without_loss={
            split: text.all_tokens + text.documents - text.tokens for split, text in prepared.texts.items()
        },
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        memory_mb=memory_estimate_mb(
            model,
            config.training.batch_size,
            config.max_length,
            processes if config.speed.sharding == "fsdp" else 1,
        ),
        price_ratio=flops.price_ratio([(config.training.batch_size, config.max_length)]) if reused else 1.0,
    )


def plan(config: BenchConfig) -> tuple[Prepared, Plan]:
    """Resolve everything and train nothing: what ``--dry_run`` shows. The model is built without storage."""
    prepared = prepare(config)
    stored = 0
    if prepared.keeps_activations:
        layouts = prepared.kept_texts.layouts(prepared.base.config.hidden_size, config.speed)
        stored = layouts["train"].capacity
    model = load_model(prepared.base, config.model, meta=True)
    return prepared, make_plan(prepared, model, count(), stored_blocks=stored)


def make_stream(prepared: Prepared, seed: int, rank: int, world: int) -> BatchStream:
    """The batches of a seed, for one of ``world`` processes."""
    training = prepared.config.training
    size, accum = training.batch_size, training.grad_accum
    return BatchStream(prepared.blocks, size, accum, seed, rank=rank, world=world, aside=prepared.aside)
