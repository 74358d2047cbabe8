"""Study 1, price: for how much less can be had what LoRA on all layers reaches at its best.

    python studies/price.py run casino MODEL_FOLDER DATA_FOLDER studies/records/price-casino.jsonl
    python studies/price.py report casino studies/records/price-casino.jsonl

Arms: adapters on all layers; on the top half and the top quarter, whose frozen prefix is computed once a
block and kept; and freeze as you go, all layers at first, from a share of the batches on only those above a
layer, while what lies below is computed once a block more and kept. Everything is charged as if its run
were alone, in the units of :mod:`iterbatch.model.flops`; an adapter that rests is charged as merged.
``PLANS`` says on what text and how much of it, for the model of studies/get_smollm2.py. (The bundled one has
been trained on STAR.)

Rank and rate of a placement are tuned at a middling number of epochs by the loss on validation, mean of
tuning seeds, a step further beyond an edge of the rates; then each number of epochs is trained with fresh
seeds and scored on at least 100 test dialogues. Freeze as you go takes the rank of all
layers, their rate and half of it. Every run is one line of the records, written when it ends: the same
command goes on where it was stopped. A GPU is used where there is one, with products in TF32; workers share
it, so that its seconds mean little: benchmarks/shapes.py has those of a pass.
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from iterbatch.bench.prepare import make_stream, prepare
from iterbatch.checks import make_config
from iterbatch.data.batch import MicroBatch
from iterbatch.data.windows import prepare_eval
from iterbatch.evaluation.perplexity import Score, score
from iterbatch.model.base import PRECISION
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import FlopModel, flop_model
from iterbatch.model.lora import adapter_parameters, reset_adapter
from iterbatch.model.weights import load_model
from iterbatch.report import stats
from iterbatch.reuse.prefix import PrefixSource, Receipt
from iterbatch.runtime.processes import make_accelerator
from iterbatch.training.passes import make_optimizer, schedule, warmup_share

Line = dict[str, Any]  # of the records
STEP = 2.0  # factor between two rates
LENGTH = 128


@dataclass(frozen=True)
class Run:
    """One run: ``rest_from`` is a share of its batches, ``rest_below`` the first layer that learns on."""

    lora_layers: str
    rank: int
    epochs: int
    lr: float
    seed: int
    rest_from: float = 1.0
    rest_below: int = 0


# ------------------------------------------------------------------------------------------------------------
# Which runs


@dataclass(frozen=True)
class Arm:
    """A placement: epochs at which its rank and rate are tuned, and those trained with fresh seeds."""

    name: str
    lora_layers: str
    ranks: tuple[int, ...]
    tuned_at: int
    epochs: tuple[int, ...]
    rests: tuple[tuple[int, float, int], ...] = ()  # (epochs, from, below) of freeze as you go


@dataclass(frozen=True)
class Plan:
    """A model, a text, and the arms on them."""

    text: str  # folder below dialogue in the folder of texts
    rows: int  # of a batch
    train_tokens: int
    validation_tokens: int  # from here on in whole documents
    test_tokens: int
    rates: tuple[float, ...]
    arms: tuple[Arm, ...]

    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


# Fresh seeds are cut to what two cores can do: one number of epochs an arm, and a second of all layers, off
# which to read what a difference is worth. Not trained: more epochs, and other layers to rest below.
REAL = (
    Arm("all", "all", (16, 64), 2, (1, 2), ((3, 1 / 3, 15),)),
    Arm("half", "top:15", (16, 64), 3, (3,)),
    Arm("quarter", "top:8", (16, 64), 4, (4,)),
)
# For the second text, with ranks as in earlier studies.
AGAIN = (
    Arm("all", "all", (16,), 2, (1, 2, 3), ((3, 1 / 3, 15), (2, 1 / 2, 15))),
    Arm("half", "top:15", (64,), 3, (2, 4)),
    Arm("quarter", "top:8", (64,), 4, (3, 6)),
)
RATES = (0.75e-3, 1.5e-3, 3e-3)
PLANS = {
    "casino": Plan("casino", 16, 65536, 9000, 34000, RATES, REAL),
    "star": Plan("star", 16, 65536, 20000, 40000, RATES, AGAIN),
    # What two cores can do: few dialogues, so that more epochs than two are worth a try.
    "scarce": Plan(
        "star",
        4,
        12288,
        5000,
        26000,
        (1.5e-3, 3e-3, 6e-3),
        (
            Arm("all", "all", (16,), 2, (1, 2, 3), ((3, 1 / 3, 15),)),
            Arm("half", "top:15", (64,), 3, (3,)),
        ),
        (1000, 1001),
        (0, 1, 2, 3),
    ),
}


# ------------------------------------------------------------------------------------------------------------
# One run


class Kept(PrefixSource):
    """Prefix activations of a text, kept in memory from the first time a row is met."""

    def __init__(self, model: CutModel, device: torch.device) -> None:
        super().__init__(model, device)
        self.rows: dict[int, torch.Tensor] = {}

    def fetch(self, micro: MicroBatch) -> tuple[torch.Tensor, Receipt]:
        """All rows of a micro-batch, computed together where one is new."""
        new = [block for block in micro.blocks or () if block not in self.rows]
        if new:
            hidden = self.model.prefix(micro)
            self.rows |= {block: hidden[row].clone() for row, block in enumerate(micro.blocks or ())}
        length = micro.input_ids.shape[1]
        return torch.stack([self.rows[block][:length] for block in micro.blocks or ()]), Receipt(len(new))


class Bench:
    """A model with adapters on some layers, its text, and what runs share: the prefixes of frozen layers."""

    def __init__(self, plan: Plan, model: str, data: str, lora_layers: str, rank: int) -> None:
        config = make_config(
            model_name=model,
            dataset="dialogue",
            data_dir=f"{data}/dialogue/{plan.text}",
            max_length=LENGTH,
            batch_size=plan.rows,
            max_train_tokens=plan.train_tokens,
            max_eval_tokens=plan.test_tokens,
            lora_layers=lora_layers,
            lora_rank=rank,
            lora_alpha=rank,
            dtype="float32",
        )
        self.prepared = prepare(config)
        validation = self.prepared.corpus.splits["validation"]
        self.texts = {
            **self.prepared.texts,
            "validation": prepare_eval(
                validation, self.prepared.base.tokenizer, LENGTH, plan.validation_tokens
            ),
        }
        self.plan, self.accelerator = plan, make_accelerator(PRECISION[self.prepared.base.dtype])
        self.device = self.accelerator.device
        self.model = load_model(self.prepared.base, config.model).to(self.device)
        self.cut = CutModel(self.model)
        self.kept = {text: self._source(self.cut) for text in ("train", "validation", "test")}

    def _source(self, cut: CutModel) -> PrefixSource:
        return Kept(cut, self.device) if cut.cut else PrefixSource(cut, self.device)

    def train(self, run: Run) -> Line:
        """Train, and score: a line of the records."""
        training, seed = self.prepared.config.training, run.seed
        reset_adapter(self.model, seed)
        cut, source, prices = self.cut.train(), self.kept["train"], flop_model(self.model)
        parameters = list(adapter_parameters(self.model).values())
        optimizer = make_optimizer(self.model, run.lr, 0.0)
        stream = make_stream(self.prepared, seed, 0, 1)
        batches = stream.batches_per_epoch * run.epochs
        warmup, met, flops, start = warmup_share(0.1, batches), set[int](), 0.0, perf_counter()
        for number in range(batches):
            if number == round(run.rest_from * batches):
                cut, prices, met = self.rest(run.rest_below), rested(self.model, run.rest_below), set[int]()
                source = self._source(cut)
            (micro,) = next(stream).to(self.device).micro_batches
            for group in optimizer.param_groups:
                group["lr"] = run.lr * schedule((number + 0.5) / batches, warmup)
            nats = cut(source.fetch(micro)[0], micro).sum() / micro.label_tokens
            nats.backward()
            moving = [each for each in parameters if each.requires_grad]
            torch.nn.utils.clip_grad_norm_(moving, training.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            blocks, shape = set(micro.blocks or ()), micro.input_ids.shape
            flops += prices.repeat([(shape[0], shape[1])])
            flops += prices.prefix.of([(len(blocks - met), shape[1])])
            met |= blocks
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - start
        splits = ("validation",) if seed in self.plan.tuning_seeds else ("validation", "test")
        scores = {split: self.score(split, cut) for split in splits}
        for parameter in parameters:
            parameter.requires_grad_(True)
        unit = flop_model(self.model).fresh([(self.plan.rows, LENGTH)])
        measured = {"batches": batches, "flops": flops, "flops_of_a_fresh_pass": unit, "seconds": seconds}
        return asdict(run) | measured | {split: documents(each) for split, each in scores.items()}

    def rest(self, below: int) -> CutModel:
        """From now on only the adapters of layers from ``below`` on learn."""
        inner: Any = self.model.get_base_model()
        for layer in inner.model.layers[:below]:
            layer.requires_grad_(False)
        return CutModel(self.model).train()

    def score(self, split: str, cut: CutModel) -> Score:
        """Of a text, with the adapter as it is."""
        source = self.kept[split] if cut is self.cut else PrefixSource(cut, self.device)
        return score(cut, self.texts[split], self.accelerator, source=source)


def rested(model: Any, below: int) -> FlopModel:
    """What a pass costs when the adapters of the layers below ``below`` are merged into frozen weights."""
    blank = list(model.get_base_model().model.layers[:below])
    ranks = [
        (module, dict(module.r)) for layer in blank for module in layer.modules() if hasattr(module, "r")
    ]
    for module, _ in ranks:
        module.r = {}
    try:
        return flop_model(model)
    finally:
        for module, r in ranks:
            module.r = r


def documents(scored: Score) -> Line:
    """Loss, and the sums of every document."""
    nats = [round(each, 4) for each in scored.document_nats]
    return {"loss": scored.nats / scored.tokens, "nats": nats, "tokens": scored.document_tokens}


# ------------------------------------------------------------------------------------------------------------
# Which are to be made


def tuned(plan: Plan, arm: Arm, records: Sequence[Line]) -> tuple[tuple[int, float] | None, list[Run]]:
    """The best rank and rate, None while trials are missing; and those."""
    best: dict[int, float] = {}
    trials: list[Run] = []
    for rank in arm.ranks:
        rate, missing = best_rate(plan, arm, rank, records)
        trials += missing
        if rate is not None:
            best[rank] = rate
    if trials:
        return None, trials
    return min(best.items(), key=lambda each: tuning_loss(plan, arm, *each, records)), []


def best_rate(plan: Plan, arm: Arm, rank: int, records: Sequence[Line]) -> tuple[float | None, list[Run]]:
    """The best rate at a rank, None while trials are missing; and those."""
    rates = list(plan.rates)
    while True:
        if trials := [
            run for lr in rates for run in tuning(plan, arm, rank, lr) if found(run, records) is None
        ]:
            return None, trials
        best = min(rates, key=lambda lr: tuning_loss(plan, arm, rank, lr, records))
        if min(rates) < best < max(rates) or len(rates) == len(plan.rates) + 3:
            return best, []
        rates.append(best * STEP if best == max(rates) else best / STEP)


def tuning(plan: Plan, arm: Arm, rank: int, lr: float) -> list[Run]:
    """The trials of a rank and rate."""
    return [Run(arm.lora_layers, rank, arm.tuned_at, lr, seed) for seed in plan.tuning_seeds]


def tuning_loss(plan: Plan, arm: Arm, rank: int, lr: float, records: Sequence[Line]) -> float:
    """Loss on validation, mean of the tuning seeds."""
    lines = [found(run, records) or {} for run in tuning(plan, arm, rank, lr)]
    return float(np.mean([line["validation"]["loss"] for line in lines]))


def found(run: Run, records: Sequence[Line]) -> Line | None:
    """The line of a run, None while there is none."""
    wanted = asdict(run)
    return next((line for line in records if all(line[key] == wanted[key] for key in wanted)), None)


def missing(plan: Plan, records: Sequence[Line]) -> Iterator[Run]:
    """Runs that can be made now: trials, then of arms that are tuned, seed by seed."""
    state = [(arm, *tuned(plan, arm, records)) for arm in plan.arms]
    for _, _, trials in state:
        yield from trials
    for seed in plan.seeds:
        for arm, best, _ in state:
            runs = finals(arm, *best, seed) if best is not None else []
            yield from (run for run in runs if found(run, records) is None)


def finals(arm: Arm, rank: int, lr: float, seed: int) -> list[Run]:
    """All runs of a seed."""
    plain = [Run(arm.lora_layers, rank, epochs, lr, seed) for epochs in arm.epochs]
    rests = [
        Run(arm.lora_layers, rank, epochs, rate, seed, at, below)
        for epochs, at, below in arm.rests
        for rate in (lr / STEP, lr)
    ]
    return [*rests, *reversed(plain)]


def read(file: Path) -> list[Line]:
    """All lines so far."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


_benches: dict[tuple[str, int], Bench] = {}


def make(plan: str, model: str, data: str, run: Run) -> Line:
    """Make a run in this process, which keeps what runs of a placement share, on a GPU of all placements."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    key = (run.lora_layers, run.rank)
    if key not in _benches:
        if not torch.cuda.is_available():
            _benches.clear()
        _benches[key] = Bench(PLANS[plan], model, data, *key)
    return _benches[key].train(run)


def run_all(plan: str, model: str, data: str, file: Path, workers: int) -> None:
    """Make every run that is missing, and write its line."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        going: dict[Any, Run] = {}
        while True:
            for run in missing(PLANS[plan], read(file)):
                if len(going) < workers and run not in going.values():
                    going[pool.submit(make, plan, model, data, run)] = run
            if not going:
                return
            for done in wait(going, return_when=FIRST_COMPLETED).done:
                line = done.result()
                with file.open("a", encoding="utf-8", newline="\n") as out:
                    out.write(json.dumps(line) + "\n")
                run = going.pop(done)
                print(run, round(math.exp(line["validation"]["loss"]), 3), round(line["seconds"]), flush=True)


# ------------------------------------------------------------------------------------------------------------
# What they say

Runs = dict[int, Line]  # of an arm, by seed
Key = tuple[str, int, float, int, float]  # placement, epochs, when and below which layer it rests, rate


def report(plan: Plan, records: Sequence[Line]) -> None:
    """Print every tuning curve, and what every arm reached, for what, against all layers at their best."""
    for arm in plan.arms:
        _print_curve(arm, [line for line in records if line["seed"] in plan.tuning_seeds])
    arms: dict[Key, Runs] = {}
    for line in records:
        if line["seed"] in plan.seeds:
            key = (line["lora_layers"], line["epochs"], line["rest_from"], line["rest_below"], line["lr"])
            arms.setdefault(key, {})[line["seed"]] = line
    arms = {key: runs for key, runs in arms.items() if len(runs) > 1}  # an interval needs two
    plain = {key: runs for key, runs in arms.items() if key[0] == "all" and key[2] == 1}
    if not plain:
        return
    best = min(plain, key=lambda key: mean_loss(plain[key], "validation"))
    print(f"all layers are best at {best[1]} epochs, by validation; worth is against the all-layers curve")
    reference = arms[best]
    ladder = sorted((cost(runs) / cost(reference), rise(runs, reference)) for runs in plain.values())
    share = stats.exchange([each for each, _ in ladder], [each for _, each in ladder])
    for key in sorted(arms):
        print(_row(key, arms[key], reference, share))


def _print_curve(arm: Arm, trials: Sequence[Line]) -> None:
    own = [line for line in trials if line["lora_layers"] == arm.lora_layers]
    for rank, lr in sorted({(line["rank"], line["lr"]) for line in own}):
        losses = [line["validation"]["loss"] for line in own if (line["rank"], line["lr"]) == (rank, lr)]
        told = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"tuning {arm.name}, {arm.tuned_at} epochs, rank {rank}, rate {lr:.3g}: {told}")


def _row(key: Key, runs: Runs, reference: Runs, share: Callable[[float], float]) -> str:
    lora_layers, epochs, rest_from, rest_below, lr = key
    seeds = sorted(set(runs) & set(reference))
    tokens = np.array(runs[seeds[0]]["test"]["tokens"])
    found = stats.compare(nats(runs, seeds), nats(reference, seeds), tokens)
    needed = [share(runs[seed]["test"]["loss"] - reference[seed]["test"]["loss"]) for seed in seeds]
    worth = stats.speed_up(needed, [runs[seed]["flops"] / reference[seed]["flops"] for seed in seeds])
    resting = f", below {rest_below} resting from {rest_from:.2f}" if rest_below else ""
    passes = cost(runs) / reference[seeds[0]]["flops_of_a_fresh_pass"]
    seconds = np.median([runs[seed]["seconds"] / reference[seed]["seconds"] for seed in seeds])
    return (
        f"{lora_layers}, {epochs} epochs{resting}: {len(seeds)} seeds, rank {runs[seeds[0]]['rank']}, "
        f"rate {lr:.3g}, "
        f"{passes:.1f} passes of all layers, test perplexity {math.exp(mean_loss(runs, 'test')):.3f}, "
        f"difference {found.estimate:+.4f} [{found.low:+.4f}, {found.high:+.4f}], "
        f"worth {worth.estimate:.2f} [{worth.low:.2f}, {worth.high:.2f}], seconds x {seconds:.2f}"
    )


def cost(runs: Runs) -> float:
    """FLOPs of an arm: every seed spends the same."""
    return next(iter(runs.values()))["flops"]


def nats(runs: Runs, seeds: Sequence[int]) -> np.ndarray:
    """(seeds, documents) of the test."""
    return np.array([runs[seed]["test"]["nats"] for seed in seeds])


def mean_loss(runs: Runs, split: str) -> float:
    """Over seeds, nats a token."""
    return float(np.mean([line[split]["loss"] for line in runs.values()]))


def rise(runs: Runs, reference: Runs) -> float:
    """Mean over common seeds of how much more is lost on test."""
    seeds = set(runs) & set(reference)
    return float(np.mean([runs[seed]["test"]["loss"] - reference[seed]["test"]["loss"] for seed in seeds]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running, reporting = commands.add_parser("run"), commands.add_parser("report")
    for command in (running, reporting):
        command.add_argument("plan", choices=PLANS)
    running.add_argument("model", help="folder, or 'bundled'")
    running.add_argument("data", help="folder of texts, with dialogue/casino and dialogue/star")
    for command in (running, reporting):
        command.add_argument("records", type=Path)
    running.add_argument("--workers", type=int, default=2)
    flags = parser.parse_args()
    if flags.command == "run":
        run_all(flags.plan, flags.model, flags.data, flags.records, flags.workers)
    else:
        report(PLANS[flags.plan], read(flags.records))


if __name__ == "__main__":
    main()
