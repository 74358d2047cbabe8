"""What passes cost at the shapes of LLaMAs of 135 M, 1.1 B and 6.7 B parameters, beside Hugging Face Trainer.

    python benchmarks/shapes.py 135m 1b 7b --out shapes.jsonl
    python benchmarks/shapes.py 1b --compile --out shapes.jsonl

Meant for a GPU. Random weights in bfloat16: how long a pass takes does not depend on what they say. LoRA on
all layers by our loop, by Trainer at its best settings and by a bare loop; then a fresh pass and a repeat of
adapters on all layers, the top half and the top quarter. What is compared takes turns within a round;
figures are medians over rounds of ratios within a round. Of the top quarter, gradients with and without
kept activations are compared, in float32 and in bfloat16.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from throughput import bare_loop, matrix_peak, ours, trainer
from transformers import LlamaConfig, LlamaForCausalLM

from iterbatch.bench.price import Probe
from iterbatch.checks import make_config
from iterbatch.config import BenchConfig
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.model.base import PRECISION
from iterbatch.model.compiled import compiled
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import flop_model
from iterbatch.model.lora import adapted_layers, adapter_parameters, attach_adapter, reset_adapter
from iterbatch.runtime.processes import make_accelerator
from iterbatch.strategy.original import BaselineStrategy

# width, MLP, layers, heads, key heads, vocabulary, tied; rows and length of a batch
SHAPES = {
    "tiny": (64, 128, 4, 4, 2, 512, False, 2, 32),  # to try this file without a GPU
    "135m": (576, 1536, 30, 9, 3, 49152, True, 16, 128),  # SmolLM2
    "1b": (2048, 5632, 22, 32, 4, 32000, False, 4, 512),  # TinyLlama
    "7b": (4096, 11008, 32, 32, 32, 32000, False, 4, 512),  # LLaMA
}
PASSES = 8  # counted ones of a turn


def random_llama(
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocabulary: int,
    *,
    dtype: str,
    tied: bool = False,
) -> LlamaForCausalLM:
    """A LLaMA of a shape with random weights, the same in every process."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


class Bed:
    """A model of a shape with random weights on the device, and what is needed to train it."""

    def __init__(self, shape: str, dtype: str) -> None:
        width, mlp, layers, heads, key_heads, vocabulary, tied, self.rows, self.length = SHAPES[shape]
        self.layers, self.dtype = layers, dtype
        self.config: BenchConfig = make_config(batch_size=self.rows, max_length=self.length, dtype=dtype)
        self.accelerator = make_accelerator(PRECISION[dtype])
        with self.accelerator.device:
            shape_of = (width, mlp, layers, heads, key_heads, vocabulary)
            self.model: Any = random_llama(*shape_of, dtype=dtype, tied=tied)
        rows = (PASSES + 4) * self.rows
        tokens = torch.randint(0, vocabulary, (rows, self.length), generator=torch.Generator().manual_seed(0))
        self.blocks = Blocks.of(tokens.numpy())

    def adapted(self, spec: str) -> Any:
        """The model with adapters on some layers; ``unload`` takes them off."""
        layers = adapted_layers(spec, self.layers)
        adapted = attach_adapter(self.model, self.dtype, self.config.model, layers)
        return adapted.train().to(self.accelerator.device)

    def turn(self, measure: Callable[[Any], Any], spec: str = "all") -> Any:
        """What a measurement of the model with fresh adapters says."""
        adapted = self.adapted(spec)
        try:
            return measure(adapted)
        finally:
            self.model = adapted.unload()
            self.accelerator.free_memory()


def loops(bed: Bed, rounds: int, scratch: Path) -> dict[str, list[float]]:
    """Seconds a pass of LoRA on all layers, by loop, of each round."""
    settings = {"bf16": bed.dtype == "bfloat16", "optim": "adamw_torch_fused"}
    on_cpu = bed.accelerator.device.type == "cpu"

    def mine(adapted: Any) -> float:
        placed = bed.accelerator.prepare_model(CutModel(adapted))
        prices, strategy = flop_model(adapted), BaselineStrategy()
        return ours(adapted, placed, prices, bed.blocks, bed.accelerator, strategy, PASSES, rows=bed.rows)

    def theirs(adapted: Any) -> float:
        return trainer(adapted, bed.blocks, PASSES, scratch, rows=bed.rows, use_cpu=on_cpu, **settings)

    def bare(adapted: Any) -> float:
        return bare_loop(adapted, bed.blocks, PASSES, rows=bed.rows)

    variants = {"ours": mine, "Trainer": theirs, "bare loop": bare}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name in list(variants) if index % 2 else list(variants)[::-1]:
            took = bed.turn(variants[name])
            if index:  # the first round is warm-up
                seconds[name].append(took)
    return seconds


def prices(bed: Bed, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of a fresh pass and a repeat, by placement, of each round."""
    specs = ["all", f"top:{bed.layers // 2}", f"top:{bed.layers // 4}"]
    found: dict[str, dict[str, Any]] = {spec: {"fresh": [], "repeat": []} for spec in specs}

    def both(adapted: Any) -> None:
        probe = Probe(adapted, bed.accelerator, bed.config)
        for _ in range(2):
            probe.round()
        fresh, repeat = [], []
        for _ in range(PASSES // 2):
            batch = next(probe.batches).to(bed.accelerator.device)
            fresh.append(probe._timed(partial(probe.step, batch)))
            repeat.append(probe._timed(probe.step.again))
        found[spec]["fresh"].append(statistics.median(fresh))
        found[spec]["repeat"].append(statistics.median(repeat))
        found[spec]["flops"] = probe.fresh_flops
        found[spec]["rho_flops"] = probe.price_ratio_flops

    for index in range(rounds):
        for spec in specs if index % 2 else specs[::-1]:
            bed.turn(both, spec)
    return found


def gradients_differ(bed: Bed) -> dict[str, float]:
    """Norm of the difference over norm: gradients of the top quarter with kept activations and without.

    ``repeat`` is our pass from kept activations against our own pass that computes them; ``whole`` against
    the model's own forward with torch's cross-entropy.
    """

    def compare(adapted: Any) -> dict[str, float]:
        reset_adapter(adapted, 0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapter_parameters(adapted).items():
            if "lora_B" in name:  # at 0 it would hide the gradient of A
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        batch = next(BatchStream(bed.blocks, bed.rows, 1, seed=0))
        cut, micro = CutModel(adapted), batch.to(bed.accelerator.device).micro_batches[0]
        with bed.accelerator.autocast():
            kept = cut.prefix(micro).clone()

            def through(hidden: Any) -> torch.Tensor:
                return cut(hidden, micro).sum() / micro.label_tokens

            def whole() -> torch.Tensor:
                logits = adapted(input_ids=micro.input_ids, use_cache=False).logits.float()
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro.labels.flatten())

            ways = [lambda: through(kept), lambda: through(cut.prefix(micro)), whole]
            once, again, plain = (_gradient(adapted, way) for way in ways)
        return {"repeat": _apart(once, again), "whole": _apart(once, plain)}

    return bed.turn(compare, f"top:{bed.layers // 4}")


def _gradient(adapted: Any, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    adapted.zero_grad()
    loss().backward()
    return torch.cat([each.grad.flatten().double() for each in adapter_parameters(adapted).values()])


def _apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def with_compile(bed: Bed, rounds: int) -> dict[str, Any]:
    """Seconds a pass of our loop on all layers, without and with ``--compile``, and the cold start."""
    found: dict[str, Any] = {"ours": [], "ours, --compile": []}

    def both(adapted: Any) -> None:
        placed = bed.accelerator.prepare_model(CutModel(adapted))

        def once() -> float:
            return ours(
                adapted,
                placed,
                flop_model(adapted),
                bed.blocks,
                bed.accelerator,
                BaselineStrategy(),
                PASSES,
                rows=bed.rows,
            )

        once()
        for _ in range(rounds):
            found["ours"].append(once())
        with compiled(placed, bed.accelerator, (bed.rows, bed.length)) as start:
            found["cold start"] = start.seconds
            once()
            for _ in range(rounds):
                found["ours, --compile"].append(once())

    bed.turn(both)
    return found


def measured(shape: str, rounds: int, scratch: Path, *, compile: bool) -> dict[str, Any]:
    """All figures of a shape."""
    start = time.perf_counter()
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    bed = Bed(shape, dtype)
    device = bed.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {"shape": shape, "rows": bed.rows, "length": bed.length, "device": name}
    result["torch"], result["parameters"] = torch.__version__, sum(p.numel() for p in bed.model.parameters())
    result["matrix_peak"] = matrix_peak(device, dtype)
    if compile:
        return result | {"compile": with_compile(bed, rounds)}
    result["prices"] = prices(bed, rounds)
    result["loops"] = loops(bed, rounds, scratch)
    result["gradients"] = {dtype: gradients_differ(bed)}
    if device.type == "cuda" and shape != "7b":
        bed.model = None
        torch.cuda.empty_cache()
        result["gradients"]["float32"] = gradients_differ(Bed(shape, "float32"))
    return result | {"seconds": time.perf_counter() - start}


def told(result: dict[str, Any]) -> None:
    """Print what was found."""
    peak = result["matrix_peak"]
    print(
        f"\n{result['shape']}: {result['parameters']:,} parameters, batch {result['rows']} x "
        f"{result['length']}, {result['device']}, matrix peak {peak / 1e12:.0f} TFLOP/s"
    )
    for spec, each in result.get("prices", {}).items():
        ratio = [repeat / fresh for fresh, repeat in zip(each["fresh"], each["repeat"], strict=True)]
        fresh = statistics.median(each["fresh"])
        print(
            f"{spec}: fresh {1e3 * fresh:.1f} ms, repeat {1e3 * statistics.median(each['repeat']):.1f} ms, "
            f"rho {_spread(ratio)}, in FLOPs {each['rho_flops']:.3f}, fresh at "
            f"{each['flops'] / fresh / peak:.0%} of the matrix peak"
        )
    for name in ("loops", "compile"):
        for loop, seconds in result.get(name, {}).items():
            if isinstance(seconds, list):
                ratios = [s / o for s, o in zip(seconds, result[name]["ours"], strict=True)]
                print(
                    f"{loop}: {1e3 * statistics.median(seconds):.1f} ms a pass, over ours {_spread(ratios)}"
                )
            else:
                print(f"{loop}: {seconds:.1f} s")
    print("gradients, norm of difference over norm:", result.get("gradients"), flush=True)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="our loop with and without it, nothing else")
    parser.add_argument("--scratch", type=Path, default=Path("results/shapes"))
    parser.add_argument("--out", type=Path, help="a line of JSON for each shape is added to this file")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    for shape in flags.shapes:
        result = measured(shape, flags.rounds, flags.scratch, compile=flags.compile)
        if flags.out:
            with flags.out.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(result) + "\n")
        told(result)


if __name__ == "__main__":
    main()
