"""Model and text checked and made ready, and what a run will cost, before anything is trained."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from iterbatch.model import hub
from iterbatch.config import BenchConfig, adapted_layers
from iterbatch.data.data_loader import BatchStream, EvalText, prepare_blocks, prepare_eval
from iterbatch.data.documents import NAMED, Corpus, read_corpus, unreachable_dataset
from iterbatch.errors import ConfigError, UserError
from iterbatch.model.load import Base, flop_model, load_base, load_model, memory_estimate_mb
from iterbatch.reuse.store import Layout

SPLITS = ("train", "validation", "test")  # in the order in which their activations get room


@dataclass(frozen=True)
class Prepared:
    """Text and tokenizer, ready; no weights yet."""

    config: BenchConfig
    base: Base
    corpus: Corpus
    blocks: Any  # (blocks, length) token ids, memory-mapped
    texts: dict[str, EvalText]  # validation and test

    @property
    def keeps_activations(self) -> bool:
        """Whether prefix activations are to be kept on disk, and there is a prefix."""
        return self.config.speed.reuse == "epoch" and adapted_layers(self.config.model.lora_layers, self.base.layers)[0] > 0


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
    template = _chat_template(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    corpus = read_corpus(data.dataset, dataset_config=data.dataset_config, data_dir=data.data_dir, chat_template=template)
    blocks = prepare_blocks(corpus.splits["train"], tokenizer, config.max_length, data.max_train_tokens, data_key=corpus.digest())
    texts = {split: prepare_eval(corpus.splits[split], tokenizer, config.max_length, data.max_eval_tokens) for split in ("validation", "test")}
    prepared = Prepared(config, base, corpus, blocks, texts)
    if prepared.keeps_activations:
        layouts(prepared, base.config.hidden_size)  # says whether the limit has room for a block
    return prepared


def _chat_template(tokenizer: Any) -> Any:
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)


def _tracker_problems(config: BenchConfig) -> list[str]:
    package = {"comet_ml": "comet_ml", "tensorboard": "tensorboard"}
    return [
        f"--log_with {name} needs its package: pip install {name}"
        for name in config.run.log_with
        if name != "none" and importlib.util.find_spec(package.get(name, name)) is None
    ]


def _dataset_problem(config: BenchConfig) -> str | None:
    """A word with the hub where the text comes from there; the text itself is read later."""
    known = NAMED.get(config.data.dataset)
    name = known.name if known else config.data.dataset
    if config.data.data_dir is not None or "/" not in name or hub.dataset_in_cache(name):
        return None
    problem = hub.problem_with(name, "dataset")
    return None if problem is None else unreachable_dataset(name, problem)


def layouts(prepared: Prepared, width: int) -> dict[str, Layout]:
    """The room each text's activations get within ``--reuse_limit_gb``, the training text first.

    Raises:
        ConfigError: where the limit has no room for a single block.
    """
    speed, left, result = prepared.config.speed, prepared.config.speed.reuse_limit_gb * 1e9, {}
    lengths = {"train": [prepared.blocks.shape[1]] * len(prepared.blocks)}
    lengths |= {split: [len(window.input_ids) for window in text.windows] for split, text in prepared.texts.items()}
    for split in SPLITS:
        layout = Layout(lengths[split], width, speed.reuse_dtype, left)
        if split == "train" and not layout.capacity:
            raise ConfigError(
                f"--reuse_limit_gb is {speed.reuse_limit_gb:g}, less than one block ({layout.offsets[1] / 1e9:.2g} GB); "
                f"all {len(prepared.blocks)} take {layout.offsets[-1] / 1e9:.2g} GB. Give more, or --reuse batch"
            )
        result[split], left = layout, left - layout.bytes
    return result


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before anything is trained. Counts are of one baseline arm."""

    batches: int
    tokens: int  # label tokens
    flops: float
    last_pass_flops: float  # the least its last pass may cost
    blocks: int
    max_length: int
    eval_tokens: dict[str, int]
    trainable_parameters: int
    parameters: int
    memory_mb: float
    price_ratio: float


def make_plan(prepared: Prepared, model: Any, processes: int = 1, stored_blocks: int = 0) -> Plan:
    """Count what a baseline arm will do and cost.

    Args:
        prepared: Text and tokenizer.
        model: With its adapters; weights are not needed.
        processes: That share each batch.
        stored_blocks: Training blocks whose prefix activations are kept after the first epoch.
    """
    config = prepared.config
    stream = make_stream(prepared, seed=0, rank=0, world=processes)
    flops, blocks, epochs = flop_model(model, config.model.gradient_checkpointing), len(prepared.blocks), config.training.epochs
    tokens = blocks * (config.max_length - 1)
    epoch_flops, saved = flops.fresh([(blocks, config.max_length)]), flops.prefix.of([(stored_blocks, config.max_length)])
    last_shape = [((blocks - 1) % stream.batch_rows + 1, config.max_length)]
    reused = config.speed.reuse != "off"
    return Plan(
        batches=stream.batches_per_epoch * epochs,
        tokens=tokens * epochs,
        flops=epoch_flops * epochs - saved * (epochs - 1),
        last_pass_flops=flops.repeat(last_shape) if stored_blocks and epochs > 1 else flops.fresh(last_shape),
        blocks=len(prepared.blocks),
        max_length=config.max_length,
        eval_tokens={split: text.tokens for split, text in prepared.texts.items()},
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        memory_mb=memory_estimate_mb(model, config.training.batch_size, config.max_length),
        price_ratio=flops.price_ratio([(config.training.batch_size, config.max_length)]) if reused else 1.0,
    )


def plan(config: BenchConfig) -> tuple[Prepared, Plan]:
    """Resolve everything and train nothing: what ``--dry_run`` shows. The model is built without storage."""
    prepared = prepare(config)
    stored = layouts(prepared, prepared.base.config.hidden_size)["train"].capacity if prepared.keeps_activations else 0
    return prepared, make_plan(prepared, load_model(prepared.base, config.model, meta=True), stored_blocks=stored)


def make_stream(prepared: Prepared, seed: int, rank: int, world: int) -> BatchStream:
    """The batches of a seed, for one of ``world`` processes."""
    training = prepared.config.training
    return BatchStream(prepared.blocks, training.batch_size, training.grad_accum, seed, rank=rank, world=world)
