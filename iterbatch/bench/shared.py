"""What the arms of a cell share: model, text, and what the untrained base scores and writes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterbatch.bench.base_losses import BaseLosses
from iterbatch.bench.estimate import with_seconds
from iterbatch.bench.listener import Listener
from iterbatch.bench.prepare import Plan, Prepared, make_plan
from iterbatch.config import BenchConfig
from iterbatch.data.data_loader import order_digest
from iterbatch.errors import ModelError, RunError
from iterbatch.evaluation.generate import Sampling, generate, text_metrics
from iterbatch.evaluation.perplexity import Score, score
from iterbatch.language import N_, _
from iterbatch.model.base import PRECISION
from iterbatch.model.compiled import Compiled, compiled, worth_compiling
from iterbatch.model.cut import CutModel
from iterbatch.model.lora import reset_adapter
from iterbatch.model.sharded import ShardedCutModel
from iterbatch.model.weights import load_model
from iterbatch.records import layout
from iterbatch.records.machine import environment
from iterbatch.records.origin import check_origin, origin_json, write_places
from iterbatch.records.result import TextMetrics
from iterbatch.records.write import read_json, write_json
from iterbatch.reuse.run_stores import Reuse, open_reuse
from iterbatch.runtime.interrupt import Interrupts
from iterbatch.runtime.processes import from_main, make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from torch import nn

PROMPT_TOKENS = 32
TOGETHER = 64  # prompts continued at once
OUT_OF_MEMORY = N_(
    "out of memory. Records and the last checkpoint are kept: free memory and resume by --resume, or "
    "start a new run with a smaller --batch_size (and more --grad_accum), a smaller --max_length or "
    "--eval_batch_size, --gradient_checkpointing, adapters on fewer layers (--lora_layers top:N), or "
    "--load_in 4bit"
)

Between = Callable[[], None]  # called where a run may be stopped


@dataclass(frozen=True)
class Sample:
    """What was written to the fixed prompts, by decoding, and its metrics."""

    texts: Mapping[str, list[str]]
    metrics: TextMetrics

    def as_json(self) -> dict[str, Any]:
        """As ``samples.json`` holds it."""
        return {
            decoding: {"texts": texts, **self.metrics[decoding]} for decoding, texts in self.texts.items()
        }


class Shared:
    """Everything that the arms of a cell share, ready on the device.

    Args:
        prepared: Text and tokenizer.
        plan: What a baseline arm does.
        model: The PEFT model.
        placed: The same weights as a :class:`iterbatch.model.cut.CutModel`, prepared by the accelerator.
        reuse: Where prefix activations come from.
        accelerator: Of the run.
        interrupts: Say whether the run was asked to stop.
        run_dir: Of the cell.
        compiled_for: The shapes that layers are compiled for, if they are.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        model: PeftModel,
        placed: nn.Module,
        reuse: Reuse,
        accelerator: Accelerator,
        interrupts: Interrupts,
        run_dir: Path,
        compiled_for: Compiled | None = None,
    ) -> None:
        self.prepared, self.plan, self.config = prepared, plan, prepared.config
        self.model, self.placed, self.reuse = model, placed, reuse
        self.accelerator, self.interrupts, self._compiled = accelerator, interrupts, compiled_for
        # For scoring, where processes may do different numbers of forwards.
        self.cut: CutModel = accelerator.unwrap_model(placed)
        self.base_losses = BaseLosses(
            run_dir, prepared.blocks, model, self.cut, accelerator, self.config.training.eval_batch_size
        )
        self.base_nats: dict[int, float] = {}  # of training blocks that were scored with the base
        self.prompts, self.human = ([part[side] for part in _prompts(prepared)] for side in (0, 1))
        reset_adapter(model, seed=0)  # a new adapter adds nothing, so this is the base itself
        self.validation = self.score("validation", interrupts.check)
        self.samples = self.sample(interrupts.check)

    def warm(self, shape: tuple[int, int], *, training: bool = True) -> None:
        """Compile for micro-batches of one more shape, off every arm's clock, where layers are compiled."""
        if self._compiled is not None:
            self._compiled.warm(shape, training=training)

    def score(self, split: str, between: Between) -> Score:
        """Score a split with the model as it is; ``between`` is called between two groups of windows."""
        tokenizer = self.prepared.base.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        several = self.accelerator.num_processes > 1  # they must stop at the same place
        return score(
            self.cut,
            self.prepared.texts[split],
            self.accelerator,
            source=self.reuse.sources[split],
            batch_size=self.config.training.eval_batch_size,
            pad_id=int(pad),  # pyright: ignore[reportArgumentType] - an id, not a list of them
            between=(lambda: None) if several else between,
        )

    def sample(self, between: Between) -> Sample:
        """Continue the fixed prompts, greedy and sampled, and measure the text."""
        tokenizer = self.prepared.base.tokenizer
        texts, metrics = {}, {}
        for decoding, greedy in (("greedy", True), ("sampled", False)):
            if self.accelerator.num_processes == 1:
                between()
            tokens: list[list[int]] = []
            for start in range(0, len(self.prompts), TOGETHER):
                prompts, sampling = self.prompts[start : start + TOGETHER], Sampling(seed=start)
                with self.accelerator.autocast():
                    tokens += generate(
                        self.model, prompts, tokenizer, sampling, greedy=greedy, together=self.cut.sharded
                    )
            texts[decoding] = [str(tokenizer.decode(text)) for text in tokens]
            metrics[decoding] = text_metrics(tokens)
        return Sample(texts, metrics)


def _prompts(prepared: Prepared) -> list[tuple[list[int], list[int]]]:
    """Stretches of validation text, all of one length, each with what follows it there.

    Openings of documents first, then places evenly spread.
    """
    wanted, new = prepared.config.training.prompts, Sampling().new_tokens
    windows = [window.input_ids[1:].tolist() for window in prepared.texts["validation"].windows]
    length = min(PROMPT_TOKENS, max(map(len, windows)) or 1, max(1, prepared.base.context - new))
    openings = [(ids[:length], ids[length : length + new]) for ids in windows if len(ids) >= length]
    if len(openings) >= wanted:
        return openings[:wanted]
    starts = [(ids, start) for ids in windows for start in range(0, len(ids) - length + 1, 2 * length)]
    places = [
        (ids[start : start + length], ids[start + length : start + length + new]) for ids, start in starts
    ]
    spread = min(wanted, len(places))
    return [places[round(at * (len(places) - 1) / max(1, wanted - 1))] for at in range(spread)]


@contextlib.contextmanager
def set_up(
    prepared: Prepared, run_dir: Path, listener: Listener, asked: Interrupts | None = None
) -> Iterator[Shared]:
    """Load the model, place it, open the stores, and write the manifest.

    Args:
        prepared: Text and tokenizer.
        run_dir: Of the cell.
        listener: Is notified of how it goes.
        asked: Notes while it lasts whether the run is to stop, where somebody else is to see it too.

    Raises:
        RunError: where what is done with it runs out of memory.
    """
    config = prepared.config
    check_origin(run_dir, prepared.origin)
    model = load_model(prepared.base, config.model)
    accelerator = make_accelerator(PRECISION[prepared.base.dtype])
    for message in prepared.notes:
        listener.note(message)
    # Once a run: Accelerate silently skips a model that it has prepared before, and its gradients
    # would then not be
    # synchronised.
    placed = _placed(model, accelerator, config)
    cut, shape = accelerator.unwrap_model(placed), (config.training.batch_size, config.max_length)
    wanted = _compile_wanted(prepared, model, accelerator, run_dir)
    try:
        with (
            _compiled(placed, accelerator, shape, wanted, listener) as compiled_for,
            open_reuse(
                prepared.kept_texts,
                cut,
                accelerator.device,
                dataclasses.replace(config.speed, compile="off" if compiled_for is None else "on"),
                listener.note,
            ) as reuse,
            asked or Interrupts() as interrupts,
        ):
            cold_start = compiled_for.seconds if compiled_for is not None else 0.0
            plan = make_plan(prepared, model, accelerator.num_processes, reuse.stored_blocks)
            if accelerator.is_main_process and not (run_dir / layout.MANIFEST).exists():
                content = {
                    **_manifest(prepared, plan),
                    "processes": accelerator.num_processes,
                    "sharding": config.speed.sharding if cut.sharded else "none",
                    "compiled": compiled_for is not None,
                    "compile_seconds": cold_start,
                }
                write_places(run_dir, config.flat())
                write_json(run_dir / layout.MANIFEST, content)
            if listener.estimates:
                plan = with_seconds(plan, prepared.base, config)
            listener.planned(plan, run_dir)
            yield Shared(prepared, plan, model, placed, reuse, accelerator, interrupts, run_dir, compiled_for)
    except (MemoryError, RuntimeError) as problem:
        if not _out_of_memory(problem):
            raise
        raise RunError(_(OUT_OF_MEMORY)) from problem


def _compile_wanted(prepared: Prepared, model: PeftModel, accelerator: Accelerator, run_dir: Path) -> str:
    """``on``, ``off``, or ``auto`` where it is worth it: on, unless there is no compiler.

    A run that is resumed goes on as it began: compiled passes differ from others in their last digits.
    """
    config = prepared.config
    if config.speed.compile != "auto":
        return config.speed.compile
    if config.speed.sharding != "none":
        return "off"
    before = from_main(read_json(run_dir / layout.MANIFEST) if accelerator.is_main_process else None)
    if isinstance(before, dict):
        return "on" if before.get("compiled", before.get("compile_seconds", 0.0) > 0) else "off"
    arms = len(config.strategy.strategies) * len(config.training.seeds)
    flops = arms * make_plan(prepared, model, accelerator.num_processes).flops
    worth = worth_compiling(flops, prepared.base.layers, accelerator.device.type, prepared.base.dtype)
    return "auto" if worth else "off"


@contextlib.contextmanager
def _compiled(
    placed: nn.Module, accelerator: Accelerator, shape: tuple[int, int], wanted: str, listener: Listener
) -> Iterator[Compiled | None]:
    """Layers compiled, or not: of ``auto`` a machine without a compiler is no error."""
    with contextlib.ExitStack() as entered:
        made = None
        try:
            made = None if wanted == "off" else entered.enter_context(compiled(placed, accelerator, shape))
        except ModelError as problem:
            if wanted == "on":
                raise
            listener.note(str(problem))
        if made is not None:
            listener.note(
                _("layers compiled in {cold_start:.0f} s, off every arm's clock").format(
                    cold_start=made.seconds
                )
            )
        yield made


def _placed(model: PeftModel, accelerator: Accelerator, config: BenchConfig) -> nn.Module:
    """The model cut and on its device: whole in each of several processes, or sharded over them."""
    if config.speed.sharding == "fsdp" and accelerator.num_processes > 1:
        return ShardedCutModel(model, accelerator.device)
    return accelerator.prepare_model(CutModel(model))


def _out_of_memory(problem: BaseException) -> bool:
    """Torch has a class for it on GPUs only."""
    words = str(problem).lower()
    return isinstance(problem, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def _without_places(note: str, prepared: Prepared) -> str:
    for place in (prepared.corpus.source, prepared.base.path):
        note = note.replace(place, Path(place).name)
    return note


def _manifest(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    config, corpus = prepared.config, prepared.corpus
    blocks, training = prepared.trained_blocks, config.training
    local = Path(config.model.model_name).exists()
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **environment(),
        "model": {
            "name": Path(config.model.model_name).name if local else config.model.model_name,
            "type": prepared.base.config.model_type,
            "dtype": prepared.base.dtype,
        },
        "data": {
            "source": Path(corpus.source).name if config.data.data_dir else corpus.source,
            "licence": corpus.licence,
            "documents": {split: documents.documents for split, documents in corpus.splits.items()},
            "notes": [_without_places(note, prepared) for note in prepared.notes],
            "order_sha256": {
                str(seed): order_digest(blocks, seed, training.epochs) for seed in training.seeds
            },
        },
        "origin": origin_json(prepared.origin),
        "seeds": list(training.seeds),
        "plan": dataclasses.asdict(plan),
    }
