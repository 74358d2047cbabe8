"""What controls ask of ``step``: each verb does what it says, and charges what it costs."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.steps import LR, blocks
from support.steps import make_step as step_over

from iterbatch.checks import make_config
from iterbatch.data.batch import Batch
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.model.base import load_base
from iterbatch.model.lora import adapter_parameters, copy_adapter, reset_adapter
from iterbatch.model.weights import load_model
from iterbatch.runtime.processes import make_accelerator
from iterbatch.strategy import STRATEGIES, make_strategy
from iterbatch.strategy.scheduler import VERSION, Probe
from iterbatch.training import budget
from iterbatch.training.budget import Allowance
from iterbatch.training.loop import fit
from iterbatch.training.noise import noise_and_signal
from iterbatch.training.step import Extras


@pytest.fixture(params=["all", "top:1"])
def make_step(tiny, request):
    """Makes a step over a freshly reset adapter.

    With ``top:1`` there is a frozen prefix whose activations are kept.
    """
    config = make_config(**tiny, lora_layers=request.param)
    model = load_model(load_base(config), config.model)
    model.train()
    accelerator = make_accelerator("no")

    def make(lr=LR, batches=40, unit="epochs", amount=None, clip=1.0, batch_at=None, extras=None):
        reset_adapter(model, seed=1)
        allowance = Allowance(unit, amount or batches, batches)
        more = {"batch_at": batch_at, "accelerator": accelerator, "extras": extras}
        return step_over(model, allowance, lr=lr, clip=clip, **more)

    return make


def _batches(count, rows=2):
    stream = BatchStream(Blocks.of(blocks(count * rows)), rows, 1, seed=0)
    return [next(stream) for _ in range(count)]


def _same(one, two):
    return all(torch.allclose(one[name], two[name], atol=1e-7) for name in one)


def test_scaled_is_a_pass_at_another_learning_rate(make_step):
    seen, adapters = [], []
    for lr, factor in ((LR, 2.0), (2 * LR, 1.0)):
        step = make_step(lr)
        for batch in _batches(3):
            loss = step.scaled(batch, lambda loss, factor=factor: (seen.append(loss), factor)[1])
            assert seen[-1] == pytest.approx(loss, rel=1e-6)
        adapters.append((copy_adapter(step.passes.model), step.learning_rate, step.ledger.flops_fresh))
    assert _same(adapters[0][0], adapters[1][0])
    assert adapters[0][1:] == pytest.approx(adapters[1][1:])
    plain = make_step()
    for batch in _batches(3):
        plain(batch)
    assert plain.ledger.flops == pytest.approx(adapters[0][2])  # the price of a fresh pass
    assert not _same(copy_adapter(plain.passes.model), adapters[0][0])


def test_weighted_weighs_the_gradient_and_not_the_loss(make_step):
    found = []
    for weight in (1.0, 3.0):
        step = make_step(clip=1e9)
        batch = _batches(1)[0]
        loss = step.weighted(batch, lambda _, weight=weight: weight)
        found.append((loss, step.record([loss], 1).gradient_norm, step.ledger.flops))
    assert found[0][0] == found[1][0]
    assert 3 * found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert found[0][2] == found[1][2]


def test_parts_are_small_batches_with_a_memory_as_long_in_tokens(make_step):
    step, betas = make_step(), []
    batch = _batches(1, rows=4)[0]
    optimizer = step.passes.optimizer.optimizer
    real = optimizer.step
    optimizer.step = lambda *given, **named: (
        betas.append(optimizer.param_groups[0]["betas"]),
        real(*given, **named),
    )[1]
    losses = [step.part(batch, number, 2) for number in range(2)]
    assert betas == [(0.9, pytest.approx(0.99**0.5))] * 2
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert (step.ledger.batches, step.ledger.updates) == (1, 2)
    whole = make_step()
    whole(batch)
    assert step.ledger.flops == pytest.approx(whole.ledger.flops)  # no pass over a row more than once
    assert step.ledger.tokens_trained == step.ledger.tokens_unique == whole.ledger.tokens_trained
    assert step.record([sum(losses) / 2], 1).tokens == batch.label_tokens
    small = make_step()
    first = small(batch.part(0, 2))
    assert losses[0] == pytest.approx(first, rel=1e-6)
    assert losses[1] != pytest.approx(
        make_step()(batch.part(1, 2)), rel=1e-6
    )  # it follows the first part's update


def test_forward_changes_nothing_and_its_prefix_serves_the_fresh_pass(make_step):
    step, batch = make_step(), _batches(1)[0]
    before = copy_adapter(step.passes.model)
    loss = step.forward(batch)
    assert _same(before, copy_adapter(step.passes.model))
    assert (step.ledger.updates, step.ledger.batches) == (0, 0)
    assert step(batch) == pytest.approx(loss, rel=1e-6)
    shapes, model = batch.shapes, step.prices
    assert step.ledger.flops == pytest.approx(
        model.forward(shapes) - model.prefix.of(shapes) + model.fresh(shapes)
    )
    assert step.ledger.flops_probe == pytest.approx(model.forward(shapes) - model.prefix.of(shapes))


def test_a_batch_let_go_counts_and_costs_its_forward(make_step):
    step, batch = make_step(), _batches(1)[0]
    loss = step.forward(batch)
    step.skip()
    record = step.record([loss], 0, done=0)
    assert (step.ledger.batches, step.ledger.updates, record.repeats_done) == (1, 0, 0)
    assert record.flops == step.ledger.flops == pytest.approx(step.prices.forward(batch.shapes))


def test_base_loss_is_looked_up_for_nothing(make_step):
    batch = _batches(2)[1]
    nats = np.arange(4.0)
    step = make_step(extras=Extras(base_losses=nats))
    step(batch)
    paid = step.ledger.flops
    (micro,) = batch.micro_batches
    assert step.base_loss() == pytest.approx(nats[list(micro.blocks)].sum() / batch.label_tokens)
    assert step.ledger.flops == paid


def test_the_noise_scale_is_that_of_the_rows_own_gradients(make_step):
    """Micro-batches of one row: the estimate is what all rows' gradients say."""
    step = make_step(extras=Extras(noise=True), clip=1e9)
    assert math.isnan(step.noise_scale())
    rows = blocks(6)
    batch = next(BatchStream(Blocks.of(rows), 1, 6, seed=0))
    gradients = []
    for micro in batch.micro_batches:  # before any update
        cut = step.passes.model
        nats = cut(cut.prefix(micro), micro).sum() / micro.label_tokens
        nats.backward()
        found = [
            p.grad.flatten() for p in adapter_parameters(step.passes.model).values() if p.grad is not None
        ]
        gradients.append(torch.cat(found))
        step.passes.optimizer.zero_grad()
    step(batch)
    whole = torch.stack(gradients).mean(dim=0).square().sum()
    small = torch.stack(gradients[:-1]).square().sum(dim=1).mean()
    noise, signal = noise_and_signal(float(small), float(whole), 1, 6)
    assert step.noise_scale() == pytest.approx(noise / signal if signal > 0 else math.inf, rel=1e-3)


def test_noise_and_signal_are_unbiased():
    random = np.random.default_rng(0)
    truth, spread, found = random.normal(size=20), 3.0, []
    for _ in range(4000):
        rows = truth + spread * random.normal(size=(8, 20))
        small = np.mean([(rows[i : i + 2].mean(axis=0) ** 2).sum() for i in range(0, 8, 2)])
        found.append(noise_and_signal(small, (rows.mean(axis=0) ** 2).sum(), 2, 8))
    noise, signal = np.mean(found, axis=0)
    assert noise == pytest.approx(20 * spread**2, rel=0.05)
    assert signal == pytest.approx((truth**2).sum(), rel=0.05)


def test_a_part_is_priced_as_fresh_text(make_step):
    batch = _batches(1, rows=4)[0]
    half = make_step().prices.fresh(batch.part(0, 2).shapes)
    step = make_step(unit="flops", amount=1.9 * half)
    assert step.affords_part(batch, 0, 2)
    step.part(batch, 0, 2)
    assert not step.affords_part(
        batch, 1, 2
    )  # a repeat of the first half would be cheaper, and is not asked for
    step = make_step(unit="flops", amount=2.1 * half)
    step.part(batch, 0, 2)
    assert step.affords_part(batch, 1, 2)


def test_a_held_batch_is_trained_later_at_the_price_of_a_repeat(make_step):
    step, (first, second) = make_step(), _batches(2)
    step(first)
    held = step.hold()
    step.begin()
    loss = step(second)
    state, spent = copy_adapter(step.passes.model), step.ledger.flops
    revisited = step.revisit(held)
    assert step.ledger.flops - spent == pytest.approx(step.prices.repeat(first.shapes))
    record = step.record([loss], 1)
    assert record.revisited == [first.index]
    assert not _same(state, copy_adapter(step.passes.model))
    again = step.again()  # the current batch is still the second
    assert again < loss
    step.release(held)
    with pytest.raises(KeyError):
        step.revisit(held)
    twin = make_step()
    twin(first)
    twin(second)
    twin_loss = twin(Batch(first.micro_batches, first.index, first.epoch))
    assert revisited == pytest.approx(twin_loss, rel=1e-6)


KEPT = {"version": VERSION, "probes": [Probe((0.0, 0.0), (0.02, 0.018), 0.02).row() for _ in range(20)]}
UNITS = [
    ("flops", None, "all"),
    ("flops", None, "top:1"),
    ("updates", 13.0, "all"),
    ("tokens", 400.0, "all"),
    ("seconds", 0.5, "all"),
]


@pytest.mark.parametrize(("unit", "amount", "make_step"), UNITS, indirect=["make_step"])
@pytest.mark.parametrize(
    ("name", "placement"),
    [
        *((name, "at_once") for name in sorted(STRATEGIES)),
        *((name, "spaced") for name in sorted(STRATEGIES) if STRATEGIES[name].gives_k and name != "spaced"),
    ],
)
def test_no_arm_overspends_by_more_than_a_pass_and_all_end_decayed(
    make_step, name, placement, unit, amount, monkeypatch
):
    # A clock that ticks when it is read: 0.01 s between a start and a stop, whatever else the machine does.
    ticks = itertools.count()
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks)))
    batch = _batches(1)[0]
    if unit == "flops":
        amount = 9.3 * make_step().prices.fresh(batch.shapes)
    stream = BatchStream(Blocks.of(blocks(24)), 1, 2, seed=0, aside=np.array([4, 15]))
    extras = Extras(stream.pieces(), np.full(24, 3.0), noise=True)
    step = make_step(batches=6, unit=unit, amount=amount, batch_at=stream.batch, extras=extras)
    knobs = {"loss_threshold": 3.0, "max_repeats": 3, "placement": placement}
    source = KEPT if STRATEGIES[name].made_from == "scheduler" else [3, 1, 2, 2]
    strategy = make_strategy(name, knobs, seed=0, source=source)
    records = list(fit(strategy, stream, step))
    ledger = step.ledger
    spent = {
        "flops": ledger.flops,
        "updates": ledger.passes,
        "tokens": ledger.tokens_trained,
        "seconds": ledger.train_seconds,
    }[unit]
    one_pass = {
        "flops": step.prices.fresh(batch.shapes),
        "updates": 1,
        "tokens": batch.label_tokens,
        "seconds": max(record.seconds for record in records),
    }[unit]
    assert amount - one_pass <= spent <= amount + one_pass
    assert step.learning_rate <= LR * (3 if name in ("scaled_lr", "higher_lr") else 1) * 0.2
    assert sum(record.flops for record in records) == pytest.approx(ledger.flops)
