"""Tokens a second and peak memory of several processes: each with the whole model (DDP), or sharded (FSDP2).

    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --shape 1B --steps 20
    torchrun --nproc_per_node 8 benchmarks/many_gpus.py --shape 7B --layers top:8 --batch_size 4
    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --shape tiny --steps 3    # on CPUs, over gloo

Random weights of the shape, random tokens, bfloat16 where the machine computes it, LoRA of rank 8 on all
seven projections. A step is a fresh pass and a repeat, as abr makes them; the first two are warm-up. Both
kinds are measured one after the other in the same processes, DDP first.

**Measured so far on two CPU processes with the tiny shape only, to see that it runs: no machine with several
GPUs was available.** The figures of 1B and 7B are for the day there is one.
"""

import argparse
import json
import time
from typing import Any

import torch
from shapes import random_llama

from iterbatch.config import ModelConfig
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.model.base import PRECISION
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import flop_model
from iterbatch.model.lora import adapted_layers, attach_adapter
from iterbatch.model.sharded import ShardedCutModel
from iterbatch.records.machine import peak_memory_mb, reset_peak_memory
from iterbatch.reuse.prefix import PrefixSource
from iterbatch.runtime.processes import make_accelerator
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.charges import Account
from iterbatch.training.passes import Passes, make_optimizer
from iterbatch.training.step import StepSettings, TrainingStep

SHAPES = {  # width, MLP width, layers, heads, heads of keys and values, vocabulary
    "tiny": (64, 128, 4, 4, 2, 512),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "7B": (4096, 11008, 32, 32, 32, 32000),
}
WARM = 2


def make_model(shape: str, layers: str, dtype: str) -> Any:
    """A LLaMA of a shape with random weights, and its adapters; the same in every process."""
    model, depth = random_llama(*SHAPES[shape], dtype=dtype), SHAPES[shape][2]
    adapter = ModelConfig(lora_layers=layers)
    return attach_adapter(model, dtype, adapter, adapted_layers(layers, depth)).train()


def measure(kind: str, given: argparse.Namespace, accelerator: Any, dtype: str) -> dict[str, Any]:
    """Figures of one kind, the memory that of the process that has most."""
    model = make_model(given.shape, given.layers, dtype)
    flops = flop_model(model)
    sharded = kind == "fsdp"
    placed: Any = (
        ShardedCutModel(model, accelerator.device) if sharded else accelerator.prepare_model(CutModel(model))
    )
    placed.train()
    reset_peak_memory()
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, 1e-4, 0.0))
    rank, world = accelerator.process_index, accelerator.num_processes
    tokens = torch.randint(0, SHAPES[given.shape][-1], (4 * given.batch_size * world, given.max_length))
    stream = BatchStream(
        Blocks.of(tokens.numpy()), given.batch_size, given.grad_accum, 0, rank=rank, world=world
    )
    account = Account(flops, Ledger(), Allowance("epochs", 1e6, 1))
    source = PrefixSource(accelerator.unwrap_model(placed), accelerator.device)
    passes = Passes(placed, optimizer, accelerator, clip_norm=1.0)
    step = TrainingStep(passes, account, StepSettings(1e-4), source, stream.batch)
    start, before, loss = 0.0, 0, 0.0
    for index in range(given.steps + WARM):
        if index == WARM:
            start, before = time.perf_counter(), account.ledger.tokens_trained
        step(next(stream))
        loss = step.again()
    seconds = time.perf_counter() - start  # the loss has been read: the device is done
    memory = accelerator.gather(torch.tensor([peak_memory_mb()], device=accelerator.device)).max()
    accelerator.free_memory()
    return {
        "kind": kind,
        "shape": given.shape,
        "layers": given.layers,
        "processes": world,
        "device": str(accelerator.device).split(":")[0],
        "dtype": dtype,
        "tokens_per_second": round((account.ledger.tokens_trained - before) / seconds, 1),
        "peak_memory_mb": round(float(memory), 1),
        "loss": round(loss, 4),
    }


def main() -> None:
    """Measure, and print a line of JSON a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--layers", default="all", help="as --lora_layers")
    parser.add_argument("--kinds", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4, help="rows a micro-batch and process")
    parser.add_argument("--grad_accum", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=512)
    given = parser.parse_args()
    dtype = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    accelerator = make_accelerator(PRECISION[dtype])
    for kind in given.kinds:
        figures = measure(kind, given, accelerator, dtype)
        if accelerator.is_main_process:
            print(json.dumps(figures), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
