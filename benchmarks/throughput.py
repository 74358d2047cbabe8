"""Tokens a second of the baseline strategy beside Hugging Face Trainer and a bare PyTorch loop.

And the price of ABR's passes.

    python benchmarks/throughput.py --rounds 7 --passes 16
    python benchmarks/throughput.py --rounds 3 --passes 4 --model smollm2 --only baseline best

Same base, LoRA, batches (4 x 256) and learning rate. The variants take turns within each round, so
that a machine whose speed drifts treats all alike; figures are medians over rounds and of ratios
within a round. The first two passes of every turn are warm-up and not counted.
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from iterbatch.checks import make_config
from iterbatch.config import BenchConfig
from iterbatch.data.blocks import Blocks, prepare_blocks
from iterbatch.data.corpus import read_corpus
from iterbatch.data.data_loader import BatchStream
from iterbatch.model.base import PRECISION, load_base
from iterbatch.model.compiled import compiled
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import flop_model
from iterbatch.model.lora import adapter_parameters, reset_adapter
from iterbatch.model.weights import load_model
from iterbatch.reuse.prefix import PrefixSource
from iterbatch.runtime.processes import make_accelerator
from iterbatch.strategy import BaseTrainingStrategy
from iterbatch.strategy.original import ABRStrategy, BaselineStrategy
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.charges import Account
from iterbatch.training.loop import fit
from iterbatch.training.passes import Passes, make_optimizer
from iterbatch.training.step import StepSettings, TrainingStep

BATCH, LENGTH, LR, WARM = 4, 256, 5e-3, 2
COLD_STARTS: list[float] = []


def ours(
    peft,
    model,
    flops,
    blocks: Blocks,
    accelerator,
    strategy: BaseTrainingStrategy,
    batches: int,
    *,
    rows: int = BATCH,
) -> float:
    """Seconds a batch of this project's loop."""
    reset_adapter(peft, seed=0)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, LR, 0.0))
    account = Account(flops, Ledger(), Allowance("epochs", batches + WARM, batches + WARM))
    source = PrefixSource(accelerator.unwrap_model(model), accelerator.device)
    stream = BatchStream(blocks, rows, 1, seed=0)
    passes = Passes(model, optimizer, accelerator, clip_norm=1.0)
    step = TrainingStep(passes, account, StepSettings(LR), source, stream.batch)
    seconds = [record.seconds for record in fit(strategy, stream, step)]
    accelerator.free_memory()
    return sum(seconds[WARM:]) / batches


def ours_compiled(peft, model, flops, blocks: Blocks, accelerator, batches: int) -> float:
    """The same for the baseline with --compile.

    Entered anew each turn, because it holds for the whole process, and after the first turn quick.
    """
    with compiled(model, accelerator, (BATCH, LENGTH)) as cold_start:
        COLD_STARTS.append(cold_start.seconds)
        return ours(peft, model, flops, blocks, accelerator, BaselineStrategy(), batches)


def bare_loop(model, blocks: Blocks, passes: int, *, rows: int = BATCH) -> float:
    """Seconds a pass of the shortest loop one would write, with the same weights, autocast, optimizer."""
    reset_adapter(model, seed=0)
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    device = parameters[0].device
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    start = 0.0
    for index, batch in zip(range(passes + WARM), BatchStream(blocks, rows, 1, seed=0), strict=False):
        if index == WARM:
            start = time.perf_counter()
        ids = batch.micro_batches[0].input_ids.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return (time.perf_counter() - start) / passes


def trainer(
    model,
    blocks: Blocks,
    passes: int,
    scratch: Path,
    warm: int = WARM,
    lr: float = LR,
    rows: int = BATCH,
    **settings,
) -> float:
    """Seconds a pass of Hugging Face Trainer, on the batches that ours gets, in their order."""
    from peft.tuners.lora import LoraLayer
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    for module in model.modules():
        if isinstance(module, LoraLayer):
            # PEFT's default, which a user of Trainer has; this project switches it off.
            module.cast_input_dtype_enabled = True

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == warm:
                self.start = time.perf_counter()

        def on_train_begin(self, args, state, control, **_):
            self.start = time.perf_counter()

        def on_train_end(self, args, state, control, **_):
            self.end = time.perf_counter()

    reset_adapter(model, seed=0)
    stream = BatchStream(blocks, rows, 1, seed=0)
    order = np.concatenate([next(stream).micro_batches[0].input_ids.numpy() for _ in range(passes + warm)])
    dataset = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in order]
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=rows,
        max_steps=passes + warm,
        learning_rate=lr,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )
    clock = Clock()
    InOrder(model=model, args=arguments, train_dataset=dataset, callbacks=[clock]).train()
    return (clock.end - clock.start) / passes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--passes", type=int, default=16, help="counted passes of each variant in a round")
    parser.add_argument("--repeats", type=int, default=3, help="passes a batch of the ABR variant")
    parser.add_argument("--scratch", type=Path, default=Path("results/throughput"))
    parser.add_argument("--model", help="a folder in hub format; default: the bundled base")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="variants whose names hold one of these words"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    named = {} if arguments.model is None else {"model_name": arguments.model}
    config: BenchConfig = make_config(**named)
    base = load_base(config)
    corpus = read_corpus("pydocs")
    blocks = prepare_blocks(corpus.splits["train"], base.tokenizer, LENGTH, data_key=corpus.digest())
    accelerator = make_accelerator(PRECISION[base.dtype])
    # A model for each, so that no one's preparation (Accelerate patches the forward) is left over for
    # another.
    mine, fast, bare, best_model, compiled_model = (
        load_model(base, config.model).train().to(accelerator.device) for _ in range(5)
    )
    flops = flop_model(mine)
    mine, fast = ((model, accelerator.prepare_model(CutModel(model))) for model in (mine, fast))
    default_model = (
        load_model(load_base(make_config(**named | {"dtype": "float32"})), config.model)
        .train()
        .to(accelerator.device)
    )
    defaults = {"use_cpu": accelerator.device.type == "cpu"}
    best = defaults | {"bf16": base.dtype == "bfloat16", "optim": "adamw_torch_fused"}
    n, r = arguments.passes, arguments.repeats
    variants = {
        "iterbatch baseline": lambda: ours(*mine, flops, blocks, accelerator, BaselineStrategy(), n),
        "iterbatch baseline, --compile": lambda: ours_compiled(*fast, flops, blocks, accelerator, n),
        "bare PyTorch loop": lambda: bare_loop(bare, blocks, n),
        "Trainer, best settings": lambda: trainer(best_model, blocks, n, arguments.scratch, **best),
        "Trainer, best settings and torch_compile": lambda: trainer(
            compiled_model, blocks, n, arguments.scratch, **best, torch_compile=True
        ),
        "Trainer, defaults": lambda: trainer(default_model, blocks, n, arguments.scratch, **defaults),
        f"iterbatch abr, {r} passes a batch": lambda: (
            ours(*mine, flops, blocks, accelerator, ABRStrategy(1e-6, r), max(1, n // r)) / r
        ),
    }
    variants = {name: run for name, run in variants.items() if any(word in name for word in arguments.only)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(arguments.rounds):
        names = list(variants) if index % 2 == 0 else list(variants)[::-1]
        for name in names:
            seconds[name].append(variants[name]())
    report(seconds, base.dtype, arguments.rounds, n)
    peak = matrix_peak(accelerator.device, base.dtype)
    for name, each in seconds.items():
        share = flops.fresh([(BATCH, LENGTH)]) / statistics.median(each) / peak
        print(f"{name}: {share:.0%} of the matrix peak, {peak / 1e9:.0f} GFLOP/s")
    if COLD_STARTS:
        print(
            f"\nCold start of --compile: {COLD_STARTS[0]:.1f} s. Trainer's torch_compile starts within its "
            "uncounted passes."
        )


def matrix_peak(device, dtype: str) -> float:
    """FLOPs a second of a large product of two matrices, the best of some."""
    size = 2048 if device.type == "cpu" else 16384
    one, two = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (one @ two).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def report(seconds: dict[str, list[float]], dtype: str, rounds: int, passes: int) -> None:
    eager, fast = list(seconds)[:2]
    print(
        f"\n{dtype}, {torch.get_num_threads()} threads, {rounds} rounds of {passes} passes, batch {BATCH} x "
        f"{LENGTH}, torch {torch.__version__}\n"
    )
    print(
        "| variant | ms a pass, median (min-max) | tokens/s | its time over the baseline's | over the "
        "baseline's with --compile |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, values in seconds.items():
        middle = statistics.median(values)
        ratios = [
            [value / ours for value, ours in zip(values, seconds[variant], strict=True)]
            for variant in (eager, fast)
        ]
        shown = [
            f"{statistics.median(column):.3f} ({min(column):.3f}-{max(column):.3f})" for column in ratios
        ]
        spread = f"{1e3 * middle:.0f} ({1e3 * min(values):.0f}-{1e3 * max(values):.0f})"
        print(f"| {name} | {spread} | {BATCH * LENGTH / middle:,.0f} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
