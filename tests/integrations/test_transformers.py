"""Repeats inside Trainer and SFTTrainer: one pass a batch is the trainer as it is; more are our own."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from support.steps import LR, blocks, epochs, make_step
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import iterbatch
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.errors import ConfigError, RunError
from iterbatch.integrations.transformers import RepeatCallback, RepeatMixin, repeat_batches
from iterbatch.model.lora import copy_adapter
from iterbatch.reuse.in_model import enable_prefix_reuse
from iterbatch.training.loop import fit
from iterbatch.training.passes import make_optimizer

TEXT = blocks(22)  # with windows of 2 x 4 rows the last one is short


class Rows(Dataset):
    def __init__(self, rows=TEXT):
        self.rows = torch.from_numpy(rows).long()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        labels = self.rows[at].clone()
        labels[0] = -100  # nothing predicts it; Transformers 5.0 counts it all the same
        return {"input_ids": self.rows[at], "labels": labels}


class Repeating(RepeatMixin, Trainer):
    pass


class InOrder(RepeatMixin, Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def _args(folder, **changed):
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 3,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **settings | changed)


def _trained(trainer, **kwargs):
    set_seed(3)  # of dropout; a trainer that was made in between has drawn, too
    trainer.train(**kwargs)
    return copy_adapter(trainer.model)


def _equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("strategy", ["baseline", "mixed"])
def test_one_pass_a_batch_is_the_trainer_as_it_is(llama, tmp_path, accumulation, strategy):
    """Dropout, clipping, a schedule and a short last window; the mixed run differs, so the test can fail."""
    args = _args(
        tmp_path, gradient_accumulation_steps=accumulation, lr_scheduler_type="cosine", warmup_steps=2
    )
    plain = Trainer(llama(dropout=0.1), args, train_dataset=Rows())
    ours = Repeating(
        llama(dropout=0.1),
        args,
        train_dataset=Rows(),
        strategy=strategy if strategy == "baseline" else "fixed",
        knobs={} if strategy == "baseline" else {"max_repeats": 2},
    )
    assert _equal(_trained(plain), _trained(ours)) == (strategy == "baseline")
    if strategy == "baseline":
        kept = [
            {name: entry.get(name) for name in ("loss", "grad_norm", "learning_rate", "epoch")}
            for trainer in (plain, ours)
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        half = len(kept) // 2
        assert kept[:half] == kept[half:]
        assert plain.state.total_flos == ours.state.total_flos
    assert ours.state.global_step == plain.state.global_step == len(ours.repeats.records)
    assert ours.repeats.ledger.updates == ours.state.global_step * (1 if strategy == "baseline" else 2)


SFT = {
    "text": ([{"text": "a b c d e f g h"}, {"text": "one two three"}, {"text": "x y z"}] * 4, {}),
    "packing": (
        [{"text": "a b c d e f g h " * 3}, {"text": "one two three"}] * 6,
        {"packing": True, "max_length": 32},
    ),
    "prompt": (
        [{"prompt": "how many? ", "completion": "two or three"}, {"prompt": "who? ", "completion": "x"}] * 6,
        {},
    ),
}


@pytest.mark.parametrize("form", SFT)
@pytest.mark.filterwarnings("ignore")
def test_sft_with_one_pass_a_batch_is_sft_as_it_is(llama, tmp_path, tokenizer, form):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows, settings = SFT[form]
    if settings.get("packing"):
        settings = {**settings, "packing_strategy": "wrapped"}
    data = datasets.Dataset.from_list(rows)

    class Ours(RepeatMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        learning_rate=0.01,
        gradient_checkpointing=False,
        **settings,
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    plain = trl.SFTTrainer(llama(dropout=0.1), args, train_dataset=data, processing_class=tokenizer)
    ours = Ours(llama(dropout=0.1), args, train_dataset=data, processing_class=tokenizer, strategy="baseline")
    twice = Ours(
        llama(dropout=0.1),
        args,
        train_dataset=data,
        processing_class=tokenizer,
        strategy="fixed",
        knobs={"max_repeats": 2},
    )
    expected = _trained(plain)
    assert _equal(expected, _trained(ours))
    assert not _equal(expected, _trained(twice))
    assert [record.tokens for record in ours.repeats.records] == [
        record.tokens for record in twice.repeats.records
    ]
    assert min(record.tokens for record in ours.repeats.records) > 0


class OneThreeTwo(iterbatch.BaseTrainingStrategy):
    count = 0

    def repeats(self, initial_loss):
        self.count += 1
        return (1, 3, 2)[self.count % 3]


@pytest.mark.parametrize("placement", ["at_once", "spaced"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("reuse", [False, True])
def test_repeats_are_those_of_our_own_loop(llama, tmp_path, placement, accumulation, reuse):
    count = 12 // accumulation
    strategy = OneThreeTwo(placement=placement, gap=2)
    model = llama()
    step = make_step(model, epochs(count))
    step._rate = lambda: step.passes.take_rate(LR) or LR
    real = step.passes.make
    step.passes.make = lambda batch, rate, *rest, **named: real(batch, LR, *rest, **named)
    stream = BatchStream(Blocks.of(blocks(24)), 2, accumulation, seed=0)
    batches = [next(stream) for _ in range(count)]
    order = [index for batch in batches for micro in batch.micro_batches for index in micro.blocks]
    losses = [record.losses for record in fit(strategy, iter(batches), step)]
    expected = copy_adapter(model)

    model = llama()
    optimizer = make_optimizer(model, LR, 0.0)
    if reuse:
        enable_prefix_reuse(model)
    trainer = InOrder(
        model,
        _args(tmp_path, num_train_epochs=1, gradient_accumulation_steps=accumulation, max_grad_norm=1.0),
        train_dataset=Rows(blocks(24)[order]),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        strategy=OneThreeTwo(placement=placement, gap=2),
    )
    found = _trained(trainer)
    for ours, theirs in zip(losses, [record.losses for record in trainer.repeats.records], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    assert all(torch.allclose(expected[name], found[name], atol=2e-3) for name in expected)
    assert trainer.repeats.ledger.updates == step.ledger.updates > count
    assert trainer.repeats.ledger.flops == pytest.approx(step.ledger.flops) or not reuse


RULES = {
    "abr": {"loss_threshold": 2.75},
    "window": {"loss_threshold": 1.0, "window_size": 2},
    "spaced": {"placement": "spaced", "gap": 2, "loss_threshold": 2.75},
    "learnable": {"probe_rate": 1.0, "probe_budget": 1.0},
    "budget": {"loss_threshold": 4.16},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("restored", [False, True])
def test_resumed_from_any_checkpoint_it_is_what_it_would_have_been(llama, tmp_path, rule, restored):
    def made(folder):
        return Repeating(
            llama(dropout=0.1),
            _args(
                folder,
                save_strategy="steps",
                save_steps=5,
                gradient_accumulation_steps=2,
                restore_callback_states_from_checkpoint=restored,
            ),
            train_dataset=Rows(),
            strategy={"spaced": "abr", "budget": "abr"}.get(rule, rule),
            knobs=RULES[rule],
            match="flops" if rule == "budget" else None,
            probe=[{k: v[None] for k, v in Rows()[0].items()}] if rule == "learnable" else (),
        )

    whole = made(tmp_path)
    expected = _trained(whole)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) >= 2 or rule == "budget"
    assert whole.repeats.ledger.updates > whole.state.global_step
    for checkpoint in checkpoints[:2]:
        again = made(tmp_path / "again")
        assert _equal(_trained(again, resume_from_checkpoint=str(checkpoint)), expected), checkpoint
        left = whole.state.global_step - int(checkpoint.name.split("-")[1])
        ends = whole.repeats.records[len(whole.repeats.records) - left :]
        assert [each.losses for each in again.repeats.records] == [each.losses for each in ends]
        assert again.repeats.ledger.updates == whole.repeats.ledger.updates


def test_a_checkpoint_of_the_plain_trainer_is_not_gone_on_from(llama, tmp_path):
    args = _args(tmp_path, save_strategy="steps", save_steps=5)
    Trainer(llama(), args, train_dataset=Rows()).train()
    with pytest.raises(RunError, match="made without repeats"):
        Repeating(llama(), args, train_dataset=Rows()).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("unit", ["updates", "tokens", "flops"])
def test_a_budget_ends_training_where_the_plain_trainer_would_have_spent_it(llama, tmp_path, unit):
    plain = Repeating(llama(), _args(tmp_path), train_dataset=Rows(), strategy="baseline")
    plain.train()
    ours = Repeating(
        llama(),
        _args(tmp_path, lr_scheduler_type="linear"),
        train_dataset=Rows(),
        strategy="fixed",
        knobs={"max_repeats": 3},
        match=unit,
    )
    ours.train()
    spent = {
        name: getattr(ours.repeats.ledger, field) / getattr(plain.repeats.ledger, field)
        for name, field in (("updates", "updates"), ("tokens", "tokens_trained"), ("flops", "flops"))
    }
    assert spent[unit] == pytest.approx(1, abs=0.05)
    assert ours.state.global_step < plain.state.global_step / 2
    rates = [record.learning_rate for record in ours.repeats.records]
    assert all(late < early for early, late in pairwise(rates))
    assert 0 < rates[-1] < 0.2 * rates[0]  # decayed when the budget was spent
    assert ours.state.log_history[-2]["budget_spent"] == pytest.approx(1, abs=0.2)


def test_a_budget_with_one_pass_a_batch_is_the_trainer_as_it_is(llama, tmp_path):
    args = _args(tmp_path, lr_scheduler_type="cosine", warmup_steps=3)
    expected = _trained(Trainer(llama(), args, train_dataset=Rows()))
    for unit in ("updates", "tokens", "flops"):
        trainer = Repeating(llama(), args, train_dataset=Rows(), strategy="baseline", match=unit)
        found = _trained(trainer)
        assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected), unit


def test_epochs_that_end_before_the_budget_are_said(llama, tmp_path):
    trainer = Repeating(
        llama(), _args(tmp_path), train_dataset=Rows(), strategy="baseline", match="updates", budget=99
    )
    with pytest.warns(UserWarning, match=r"22% of its budget spent.*give more num_train_epochs"):
        trainer.train()


def test_a_mixin_behind_its_trainer_would_never_be_asked():
    with pytest.raises(ConfigError, match=r"write class Behind\(RepeatMixin, \.\.\.\)"):

        class Behind(Trainer, RepeatMixin):
            pass


def test_a_budget_of_seconds_ends(llama, tmp_path, monkeypatch):
    from iterbatch.integrations import transformers as module

    clock = iter(range(10**6))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    trainer = Repeating(
        llama(),
        _args(tmp_path),
        train_dataset=Rows(),
        strategy="fixed",
        knobs={"max_repeats": 2},
        match="seconds",
        budget=12.0,
    )
    trainer.train()
    assert 11 <= trainer.repeats.ledger.train_seconds <= 14
    assert trainer.state.global_step < 22


def test_a_second_training_begins_anew(llama, tmp_path):
    settings = {"strategy": "fixed", "knobs": {"placement": "spaced", "gap": 3, "max_repeats": 2}}
    trainer = Repeating(llama(), _args(tmp_path), train_dataset=Rows(), match="tokens", **settings)
    counts = []
    for _ in range(2):
        begun = len(trainer.repeats.records)
        trainer.train()
        counts.append((len(trainer.repeats.records) - begun, trainer.repeats.ledger.tokens_trained))
        assert all(held < 3 for each in trainer.repeats.records[begun:][:3] for held in each.revisited)
        assert trainer.repeats.records[begun].revisited == []
    assert counts[0] == counts[1]


def test_a_budget_in_what_is_not_known_is_refused(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(2, 1)

        def forward(self, x, labels):
            return {"loss": (self.line(x).squeeze(1) - labels).square().mean()}

    rows = [{"x": torch.ones(2), "labels": torch.tensor(1.0)}] * 8
    for unit in ("flops", "tokens"):
        trainer = Repeating(Plain(), _args(tmp_path), train_dataset=rows, match=unit)
        with pytest.raises(ConfigError, match="not known for this model"):
            trainer.train()
    trainer = Repeating(Plain(), _args(tmp_path), train_dataset=rows, match="updates", strategy="fixed")
    trainer.train()
    assert trainer.repeats.ledger.updates == 8


@pytest.mark.filterwarnings("ignore")
def test_trls_own_metrics_are_those_of_batches(llama, tmp_path, tokenizer):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"text": "a b c d e f g h"}] * 8)

    class Ours(RepeatMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=2, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, num_train_epochs=1,
        learning_rate=0.0,
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    counts = []
    for strategy in ("baseline", "fixed"):
        trainer = Ours(llama(), args, train_dataset=data, processing_class=tokenizer, strategy=strategy)
        trainer.train()
        counts.append(
            [
                (each["num_tokens"], each["mean_token_accuracy"])
                for each in trainer.state.log_history
                if "loss" in each
            ]
        )
    assert counts[0] == counts[1]


def test_what_is_logged(llama, tmp_path):
    trainer = Repeating(
        llama(), _args(tmp_path), train_dataset=Rows(), strategy="fixed", knobs={"max_repeats": 2}
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {entry["passes_a_batch"] for entry in entries} == {2}
    assert entries[-1]["updates"] == 2 * entries[-1]["step"]


def test_other_callbacks_hear_of_every_update(llama, tmp_path):
    heard = []

    class Counting(TrainerCallback):
        def on_optimizer_step(self, *_, **__):
            heard.append("update")

        def on_step_end(self, *_, **__):
            heard.append("batch")

    trainer = Trainer(llama(), _args(tmp_path), train_dataset=Rows(), callbacks=[Counting()])
    repeats = repeat_batches(trainer, "fixed", max_repeats=3)
    trainer.train()
    assert heard.count("update") == repeats.ledger.updates == 3 * heard.count("batch")


def test_a_loss_that_is_not_finite_is_not_repeated(llama, tmp_path):
    class Broken(Repeating):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 2 else loss

    trainer = Broken(llama(), _args(tmp_path, num_train_epochs=1), train_dataset=Rows(), strategy="fixed")
    trainer.train()
    assert trainer.repeats.records[2].repeats_done == 1
    assert trainer.repeats.ledger.skipped_updates >= 1


def test_evaluation_is_the_trainers_own(llama, tmp_path):
    trainer = Repeating(
        llama(),
        _args(tmp_path, eval_strategy="steps", eval_steps=4, num_train_epochs=1),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        strategy="fixed",
        knobs={"max_repeats": 2},
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) >= 2
    assert losses[-1] < losses[0]


WRONG = {
    "max_steps": ({"max_steps": 5}, {"match": "flops"}, "max_steps is 5.*num_train_epochs"),
    "unit": ({}, {"match": "hours"}, "match is 'hours'; choose from"),
    "amount alone": ({}, {"budget": 5}, "of what"),
    "nothing": ({}, {"match": "updates", "budget": 0}, "must be above 0"),
    "seconds": ({}, {"match": "seconds"}, "budget="),
    "strategy": ({}, {"strategy": "abrr"}, "did you mean 'abr'"),
    "knob": ({}, {"knobs": {"threshold": 3}}, "has no knob 'threshold'"),
    "control": ({}, {"strategy": "permuted"}, "another arm's records"),
    "weights": ({}, {"strategy": "selective"}, "does more than repeat"),
    "probe": ({}, {"strategy": "learnable"}, "never trained on"),
    "optim": ({"optim": "adalomo"}, {}, "within a pass"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_said_before_training(llama, tmp_path, case):
    arguments, settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        Repeating(llama(), _args(tmp_path, **arguments), train_dataset=Rows(), **settings)


def test_a_schedule_that_cannot_follow_a_budget_is_said(llama, tmp_path):
    args = _args(
        tmp_path,
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=5,
        metric_for_best_model="loss",
    )
    trainer = Repeating(llama(), args, train_dataset=Rows(), eval_dataset=Rows(), match="updates")
    with pytest.raises(ConfigError, match="cannot follow a budget"):
        trainer.train()


def test_trainers_that_sample_are_refused_and_others_are_none(llama, tmp_path):
    class GRPOTrainer(Trainer):
        pass

    class MyTrainer(GRPOTrainer):
        pass

    class Another(Trainer):
        def _generate_and_score_completions(self, inputs):
            return inputs

    for kind, name in ((GRPOTrainer, "GRPOTrainer"), (MyTrainer, "GRPOTrainer"), (Another, "")):
        trainer = kind(llama(), _args(tmp_path), train_dataset=Rows())
        with pytest.raises(ConfigError, match=f"{name} samples its batches"):
            repeat_batches(trainer)
    with pytest.raises(ConfigError, match=r"not a transformers.Trainer.*iterbatch.Repeater"):
        repeat_batches(SimpleNamespace())
    trainer = Trainer(llama(), _args(tmp_path), train_dataset=Rows())
    repeat_batches(trainer)
    with pytest.raises(ConfigError, match="already"):
        repeat_batches(trainer)


def test_the_state_is_plain_json(llama, tmp_path):
    trainer = Repeating(
        llama(),
        _args(tmp_path, save_strategy="epoch"),
        train_dataset=Rows(),
        strategy="abr",
        knobs={"placement": "spaced", "loss_threshold": 2.75},
    )
    trainer.train()
    file = sorted(tmp_path.glob("checkpoint-*"))[0] / "trainer_state.json"
    saved = json.loads(file.read_text(encoding="utf-8"))["stateful_callbacks"][RepeatCallback.__name__]
    assert set(saved["attributes"]["saved"]) == {"state", "tensors"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="two processes over gloo as Linux has it")
def test_two_processes_decide_alike(tiny_folder, tmp_path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    script = ROOT / "tests" / "support" / "train_in_two.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    for count in (1, 2):
        done = subprocess.run(
            [*launch, str(count), str(script), str(tiny_folder), str(tmp_path / str(count))],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (
        json.loads((tmp_path / name).read_text(encoding="utf-8"))
        for name in ("1/0.json", "2/0.json", "2/1.json")
    )
    assert first == second  # every decision, loss, rate and weight, whatever each one's rows cost
    one, first = one["tokens"]["records"], first["tokens"]["records"]
    assert [each["done"] for each in first] == [each["done"] for each in one]
    assert len({each["done"] for each in first}) > 1
    for ours, theirs in zip(one, first, strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)
        assert theirs["tokens"] == ours["tokens"]
