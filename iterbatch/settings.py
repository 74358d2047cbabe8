"""What :func:`iterbatch.make_config` takes, for editors and type checkers; a test keeps it in step."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from iterbatch.strategy.base import BaseTrainingStrategy


class Settings(TypedDict, total=False):
    """Every setting by the name of its flag; `iterbatch train --help` says what each one is.

    Knobs of a strategy of one's own come on top, by their names.
    """

    # The base model and its adapter
    model: Literal["llama"]
    model_name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    load_in: Literal["8bit", "4bit"] | None
    quant_type: Literal["nf4", "fp4"]
    gradient_checkpointing: bool
    trust_remote_code: bool
    lora_rank: int
    lora_alpha: float
    rslora: bool
    init_lora: str
    dora: bool
    lora_dropout: float
    lora_layers: str
    lora_targets: Sequence[str]
    # The text
    dataset: str
    dataset_config: str | None
    data_dir: str | Path | None
    text_field: str | None
    encoding: str
    loss_on: Literal["all", "assistant", "completion"] | None
    special_tokens_in_text: Literal["literal", "keep"]
    max_length: int | None
    max_train_tokens: int | None
    probe_text: float | None
    max_eval_tokens: int | None
    # How long and how
    epochs: int
    batch_size: int
    grad_accum: int
    lr: float | None
    warmup: float
    weight_decay: float
    clip_norm: float
    match: Literal["epochs", "flops", "updates", "tokens", "seconds"]
    budget: float | None
    budget_share: float
    seeds: Sequence[int]
    evals: int
    on_divergence: Literal["stop", "rollback"]
    explosion: float
    prompts: int
    eval_batch_size: int
    # How passes are made cheaper
    reuse: Literal["off", "batch", "epoch"]
    reuse_dtype: Literal["bfloat16", "float32"]
    reuse_limit_gb: float
    compile: Literal["auto", "on", "off"]
    sharding: Literal["none", "fsdp"]
    # Strategies and their knobs
    strategies: "Sequence[str | type[BaseTrainingStrategy]]"
    source: str | None
    placement: str
    gap: int
    buffer: int
    loss_threshold: float | str
    max_repeats: int | None
    probe_rate: float
    probe_budget: float
    scheduler_from: str | Path | None
    scheduler_frozen: bool
    window_size: int
    block: int
    parts: int | None
    # The run
    save_dir: str | Path
    run_name: str | None
    resume: str | Path | None
    checkpoint_every: str
    overwrite: bool
    log_with: Sequence[str]
    dry_run: bool
    quiet: bool
