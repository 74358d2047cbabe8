import math

import pytest
import torch
from support.steps import LR, blocks, epochs, make_step
from torch.nn import functional

from iterbatch.checks import make_config
from iterbatch.data.batch import IGNORED, Batch, MicroBatch
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.model.base import load_base
from iterbatch.model.lora import adapter_parameters, copy_adapter, reset_adapter
from iterbatch.model.weights import load_model
from iterbatch.runtime.processes import make_accelerator
from iterbatch.strategy.controls import FixedStrategy
from iterbatch.strategy.original import ABRStrategy, BaselineStrategy
from iterbatch.training.budget import Allowance
from iterbatch.training.health import Health
from iterbatch.training.loop import fit
from iterbatch.training.passes import schedule, warmup_share


@pytest.fixture
def parts(tiny):
    """A model, and a function that makes a step over it for a budget of so many batches."""
    config = make_config(**tiny)
    model = load_model(load_base(config), config.model)
    reset_adapter(model, seed=1)
    model.train()
    accelerator = make_accelerator("no")

    def make(budget):
        allowance = budget if isinstance(budget, Allowance) else epochs(budget)
        return make_step(model, allowance, accelerator=accelerator)

    return model, make


def test_baseline_equals_a_hand_written_loop_weight_for_weight(parts, tiny):
    model, make_step = parts
    tokens = blocks(22)  # the last batch of an epoch is short
    stream = BatchStream(Blocks.of(tokens), batch_size=2, grad_accum=2, seed=5)
    batches = 2 * stream.batches_per_epoch
    step = make_step(batches)
    records = list(fit(BaselineStrategy(), stream, step))

    config = make_config(**tiny)
    twin = load_model(load_base(config), config.model)
    reset_adapter(twin, seed=1)
    twin.train()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    losses = []
    for index, batch in zip(
        range(batches), BatchStream(Blocks.of(tokens), batch_size=2, grad_accum=2, seed=5), strict=False
    ):
        fraction, rise = (index + 0.5) / batches, 0.5  # ten updates are more than half of this budget
        for group in optimizer.param_groups:
            group["lr"] = LR * (
                fraction / rise
                if fraction < rise
                else 0.5 * (1 + math.cos(math.pi * (fraction - rise) / (1 - rise)))
            )
        tokens = sum(micro.input_ids[:, 1:].numel() for micro in batch.micro_batches)
        total = 0.0
        for micro in batch.micro_batches:
            logits = twin(input_ids=micro.input_ids, use_cache=False).logits
            nats = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), micro.input_ids[:, 1:].flatten(), reduction="sum"
            )
            (nats / tokens).backward()
            total += nats.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / tokens)

    assert [record.initial_loss for record in records] == pytest.approx(losses, rel=1e-5)
    for (name, ours), theirs in zip(adapter_parameters(model).items(), parameters, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


def test_records_add_up_to_the_ledger(parts):
    _, make_step = parts
    stream = BatchStream(Blocks.of(blocks(12)), batch_size=2, grad_accum=1, seed=0)
    step = make_step(12)
    records = list(fit(ABRStrategy(loss_threshold=3.0), stream, step))
    ledger = step.ledger
    assert ledger.batches == len(records) == 12
    assert ledger.updates == sum(record.repeats_done for record in records) > 12
    assert ledger.flops == pytest.approx(sum(record.flops for record in records))
    assert ledger.tokens_trained == sum(record.tokens * record.repeats_done for record in records)
    assert ledger.tokens_unique == sum(record.tokens for record in records if record.epoch == 0) == 12 * 15
    assert ledger.train_seconds == pytest.approx(sum(record.seconds for record in records))
    assert all(
        record.losses[-1] < record.losses[0]
        for record in records
        if record.repeats_done > 1 and record.batch > 0
    )


def test_accumulation_gives_the_gradient_of_the_whole_batch(parts):
    model, make_step = parts
    ids = torch.from_numpy(blocks(6))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    labels[0, 3:] = IGNORED  # rows of unequal length: token-normalised, not a mean of means
    start = copy_adapter(model)
    results = []
    for sizes in ([6], [1, 2, 3]):
        for name, parameter in adapter_parameters(model).items():
            parameter.data.copy_(start[name])
        step = make_step(10)
        loss = step(
            Batch(tuple(MicroBatch(i, k) for i, k in zip(ids.split(sizes), labels.split(sizes), strict=True)))
        )
        results.append((loss, copy_adapter(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    # Adam's first update is the gradient's sign: where that is near 0, rounding shows. The rate is 0.01.
    assert all(torch.allclose(results[0][1][name], results[1][1][name], atol=1e-5) for name in start)


def test_a_repeat_starts_where_the_fresh_pass_ended(parts):
    _, make_step = parts
    step = make_step(4)
    batch = next(BatchStream(Blocks.of(blocks(4)), 2, 1, seed=0))
    first, second = step(batch), step.again()
    assert second < first
    assert step.again() < second


def test_an_update_that_is_not_finite_is_skipped_counted_and_ends_the_arm_after_ten(parts):
    model, make_step = parts
    stream = BatchStream(Blocks.of(blocks(60)), 2, 1, seed=0)
    make_step(30)(next(stream))
    good = copy_adapter(model)
    head = model.get_output_embeddings()
    head.weight.data[5] = float("nan")
    step, health, records, reason = make_step(30), Health(), [], None
    for record in fit(ABRStrategy(), stream, step):
        records.append(record)
        if (reason := health.judge(record, math.inf)) is not None:
            break
    assert "10 batches in a row" in reason
    assert "lower --lr" in reason
    assert step.ledger.skipped_updates == step.ledger.batches == 10
    assert step.ledger.updates == 0
    assert [record.skipped_updates for record in records] == [1] * 10
    assert all(torch.equal(good[name], value) for name, value in copy_adapter(model).items())
    # The moments have not moved either.
    assert {float(state["step"]) for state in step.passes.optimizer.state.values()} == {0.0}


@pytest.mark.parametrize(
    ("fraction", "share"), [(0.0, 0.0), (0.015, 0.5), (0.03, 1.0), (0.515, 0.5), (1.0, 0.0)]
)
def test_schedule(fraction, share):
    assert schedule(fraction, warmup=0.03) == pytest.approx(share, abs=1e-12)
    assert schedule(fraction, warmup=0.0) <= 1


@pytest.mark.parametrize(
    ("warmup", "passes", "share"),
    [(0.03, 1000, 0.03), (0.03, 100, 0.1), (0.2, 40, 0.25), (0.3, 40, 0.3), (0.03, 8, 0.5)],
)
def test_warmup_is_ten_updates_at_least_and_half_the_budget_at_most(warmup, passes, share):
    assert warmup_share(warmup, passes) == pytest.approx(share)


@pytest.mark.parametrize("unit", ["epochs", "updates", "flops"])
def test_no_pass_is_made_at_a_learning_rate_of_zero(parts, unit):
    _, make_step = parts
    stream, rates = BatchStream(Blocks.of(blocks(12)), 2, 1, seed=0), []
    amount = {"epochs": 6, "updates": 14.0, "flops": 6 * make_step(1).prices.fresh([(2, 16)])}[unit]
    step = make_step(Allowance(unit, amount, 6))
    real = step.passes.take_rate
    step.passes.take_rate = lambda rate: (rates.append(rate), real(rate))[1]
    list(fit(FixedStrategy(max_repeats=3), stream, step))
    assert min(rates) > 0
    assert rates[-1] < 0.1 * LR


@pytest.mark.parametrize("layers", ["all", "top:1"])
def test_checkpointing_changes_memory_not_gradients(tiny, layers):
    batch, gradients = next(BatchStream(Blocks.of(blocks(4)), 4, 1, seed=0)), []
    for checkpointing in (False, True):
        config = make_config(**tiny, gradient_checkpointing=checkpointing, lora_layers=layers)
        model = load_model(load_base(config), config.model)
        model.train()
        micro = batch.micro_batches[0]
        model(input_ids=micro.input_ids, labels=micro.input_ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapter_parameters(model).values()])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
