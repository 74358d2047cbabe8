"""What reusing the frozen prefix saves: across epochs, beside Hugging Face Trainer, across arms and seeds.

And what a read costs.

    python benchmarks/reuse.py                       # all parts, about 25 minutes on two cores
    python benchmarks/reuse.py --parts epochs read   # some

Bundled base, CaSiNo, batch 4 x 256, each round with an empty store. What is compared takes turns
within a round; figures are medians over rounds.

    epochs   seconds of epoch 2 over epoch 1, top:2, --reuse epoch
    trainer  3 epochs, same adapters, batches, rates: Trainer's seconds over ours, and both perplexities
    shared   4 arms x 3 seeds x 3 epochs: seconds with a shared store over the same with --reuse batch
    read     reading a block from the store over computing it
    bf16     float32 model, bfloat16 store: how much the validation perplexity after an epoch moves
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from throughput import trainer

from iterbatch.bench.prepare import Prepared, make_stream, prepare
from iterbatch.checks import make_config
from iterbatch.config import BenchConfig
from iterbatch.evaluation.perplexity import score
from iterbatch.model.base import PRECISION
from iterbatch.model.compiled import compiled
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import flop_model
from iterbatch.model.lora import reset_adapter
from iterbatch.model.weights import load_model
from iterbatch.reuse.prefetch import Prefetch
from iterbatch.reuse.run_stores import open_reuse
from iterbatch.runtime.processes import make_accelerator
from iterbatch.strategy.original import BaselineStrategy
from iterbatch.study.run import run as run_bench
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.charges import Account
from iterbatch.training.loop import fit
from iterbatch.training.passes import Passes, make_optimizer
from iterbatch.training.step import StepSettings, TrainingStep

EPOCHS, LENGTH, BATCH = 3, 256, 4
TOKENS = 98_304


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """An empty store for what runs inside."""
    before = os.environ.get("ITERBATCH_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ITERBATCH_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("ITERBATCH_CACHE") if before is None else os.environ.update(ITERBATCH_CACHE=before)


@dataclass
class Bed:
    """A model on a text, ready to be trained again and again."""

    prepared: Prepared
    model: Any
    accelerator: Any
    cut: CutModel

    @classmethod
    def make(cls, data: Path, layers: str, **flags: Any) -> "Bed":
        """Load the bundled base with adapters on some layers."""
        config: BenchConfig = make_config(
            data_dir=data,
            max_train_tokens=TOKENS,
            max_eval_tokens=10_000,
            epochs=EPOCHS,
            lora_layers=layers,
            **{"reuse": "epoch", **flags},
        )
        prepared = prepare(config)
        model, accelerator = (
            load_model(prepared.base, config.model),
            make_accelerator(PRECISION[prepared.base.dtype]),
        )
        return cls(prepared, model, accelerator, accelerator.prepare_model(CutModel(model)))

    def train(self, epochs: int = EPOCHS) -> tuple[dict[int, float], float]:
        """Seconds of each epoch of the baseline, and the validation perplexity at the end."""
        config = self.prepared.config
        reset_adapter(self.model, seed=0)
        self.cut.train()
        optimizer = self.accelerator.prepare_optimizer(make_optimizer(self.model, config.lr, 0.0))
        batches = epochs * make_stream(self.prepared, 0, 0, 1).batches_per_epoch
        account = Account(flop_model(self.model), Ledger(), Allowance("epochs", batches, batches))
        passes, texts = Passes(self.cut, optimizer, self.accelerator, clip_norm=1.0), self.prepared.kept_texts
        seconds: dict[int, float] = {}
        with open_reuse(texts, self.cut, self.accelerator.device, config.speed, print) as reuse:
            source, stream = reuse.sources["train"], make_stream(self.prepared, 0, 0, 1)
            step = TrainingStep(passes, account, StepSettings(config.lr), source, stream.batch)
            for record in fit(BaselineStrategy(), Prefetch(stream, source), step):
                seconds[record.epoch] = seconds.get(record.epoch, 0.0) + record.seconds
            ppl = self.ppl()
        self.accelerator.free_memory()
        return seconds, ppl

    def ppl(self) -> float:
        """Validation perplexity of the model as it is."""
        return score(self.cut, self.prepared.texts["validation"], self.accelerator, pad_id=2).ppl


def show(name: str, values: list[float], note: str = "") -> None:
    print(
        f"{name}: {statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f}), {len(values)} "
        f"rounds{note}",
        flush=True,
    )


def part_epochs(data: Path, rounds: int) -> None:
    for layers in ("top:4", "top:2", "top:1"):
        bed, ratios, firsts = Bed.make(data, layers), [], []
        for _ in range(rounds):
            with empty_cache():
                seconds, _ = bed.train(epochs=2)
            ratios.append(seconds[1] / seconds[0])
            firsts.append(seconds[0])
        show(f"epoch 2 / epoch 1, {layers}", ratios, f"; epoch 1 takes {statistics.median(firsts):.1f} s")


def part_trainer(data: Path, rounds: int) -> None:
    for layers in ("top:4", "top:2"):
        mine, fast, theirs = (Bed.make(data, layers) for _ in range(3))
        scratch = Path("results/reuse")
        times: dict[str, list[float]] = {"ours": [], "ours, --compile": [], "Trainer": []}
        ppls, cold = {}, []
        for _ in range(rounds):
            with empty_cache():
                seconds, ppls["ours"] = mine.train()
            times["ours"].append(sum(seconds.values()))
            with empty_cache(), compiled(fast.cut, fast.accelerator, (BATCH, LENGTH)) as start:
                seconds, ppls["ours, --compile"] = fast.train()
            cold.append(start.seconds)
            times["ours, --compile"].append(sum(seconds.values()))
            batches = EPOCHS * make_stream(theirs.prepared, 0, 0, 1).batches_per_epoch
            best = {
                "use_cpu": theirs.accelerator.device.type == "cpu",
                "bf16": theirs.prepared.base.dtype == "bfloat16",
            }
            schedule = {
                "optim": "adamw_torch_fused",
                "lr_scheduler_type": "cosine",
                "warmup_steps": round(0.03 * batches),
                "adam_beta2": 0.99,
            }
            per_pass = trainer(
                theirs.model,
                theirs.prepared.blocks,
                batches,
                scratch,
                warm=0,
                lr=theirs.prepared.config.lr,
                **best,
                **schedule,
            )
            times["Trainer"].append(per_pass * batches)
            ppls["Trainer"] = theirs.ppl()
        for name, values in times.items():
            note = f"; {statistics.median(values):.1f} s, validation perplexity {ppls[name]:.3f}"
            show(
                f"{layers}: Trainer / {name}",
                [t / v for t, v in zip(times["Trainer"], values, strict=True)],
                note,
            )
        print(f"cold start of --compile: {cold[0]:.1f} s", flush=True)


def part_shared(data: Path, rounds: int) -> None:
    for layers in ("top:2",):
        whole: dict[str, list[float]] = {"epoch": [], "batch": []}
        training: dict[str, list[float]] = {"epoch": [], "batch": []}
        for _ in range(rounds):
            for reuse in whole:
                with empty_cache():
                    config = make_config(
                        data_dir=data,
                        max_train_tokens=24_576,
                        max_eval_tokens=4_000,
                        epochs=EPOCHS,
                        lora_layers=layers,
                        seeds=[0, 1, 2],
                        reuse=reuse,
                        run_name="reuse-shared",
                        overwrite=True,
                        log_with=["none"],
                    )
                    start = time.perf_counter()
                    rows = json.loads((run_bench(config) / "summary.json").read_text(encoding="utf-8"))
                whole[reuse].append(time.perf_counter() - start)
                training[reuse].append(
                    sum(row["train_seconds"] - row["seconds_charged"] for row in rows)
                )  # what really passed
        for name, seconds in (
            ("training", training),
            ("the whole run, evaluation and samples included", whole),
        ):
            ratios = [
                with_store / without
                for with_store, without in zip(seconds["epoch"], seconds["batch"], strict=True)
            ]
            medians = [statistics.median(seconds[reuse]) for reuse in ("epoch", "batch")]
            note = "; {:.0f} s against {:.0f} s".format(*medians)
            show(f"4 arms x 3 seeds x 3 epochs, {layers}, {name}: shared store / without", ratios, note)


def seconds_a_block(action: Callable[[Any], Any], batches: list[Any]) -> float:
    start = time.perf_counter()
    for micro in batches:
        action(micro)
    return (time.perf_counter() - start) / len(batches) / BATCH


def part_read(data: Path, rounds: int) -> None:
    for layers in ("top:4", "top:2"):
        bed, ratios, reads = Bed.make(data, layers), [], []
        texts, speed = bed.prepared.kept_texts, bed.prepared.config.speed
        with empty_cache(), open_reuse(texts, bed.cut, bed.accelerator.device, speed, print) as reuse:
            source, stream = reuse.sources["train"], make_stream(bed.prepared, 0, 0, 1)
            batches = [next(stream).micro_batches[0] for _ in range(24)]

            for _ in range(rounds):
                with bed.accelerator.autocast():
                    computing = seconds_a_block(bed.cut.prefix, batches)
                    [(source.fetch(micro), source.settle()) for micro in batches]
                    assert source.store is not None
                    source.store._verified[:] = False  # as a new process reads: checksums included
                    reading = seconds_a_block(source.fetch, batches)
                ratios.append(reading / computing)
                reads.append(1e3 * reading)
        show(
            f"read / compute, a block, {layers}", ratios, f"; a read takes {statistics.median(reads):.3f} ms"
        )


def part_bf16(data: Path, rounds: int) -> None:
    for layers in ("top:4", "top:2"):
        ppls = {}
        for name, flags in (
            ("none", {"reuse": "batch"}),
            ("bfloat16", {"reuse_dtype": "bfloat16"}),
            ("float32", {"reuse_dtype": "float32"}),
        ):
            with empty_cache():
                _, ppls[name] = Bed.make(data, layers, dtype="float32", **flags).train(epochs=1)
        changes = ", ".join(
            f"{name} {100 * (ppl / ppls['none'] - 1):+.4f}%" for name, ppl in ppls.items() if name != "none"
        )
        print(
            f"validation perplexity after an epoch, float32 model, {layers}: {ppls['none']:.4f} without a "
            f"store; {changes}",
            flush=True,
        )


PARTS = {
    "read": part_read,
    "epochs": part_epochs,
    "bf16": part_bf16,
    "trainer": part_trainer,
    "shared": part_shared,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("ITERBATCH_DATA") or "../shared/data") / "dialogue" / "casino",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.parts:
        PARTS[name](arguments.data, arguments.rounds)


if __name__ == "__main__":
    main()
