"""Repeats in a loop of one's own: any model, PyTorch or Accelerate, and the same weights as our own loop."""

import copy
import math

import pytest
import torch
from support.steps import LR, blocks, epochs, make_step
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

import iterbatch
from iterbatch.config import ModelConfig
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.errors import ConfigError
from iterbatch.model.lora import attach_adapter, copy_adapter
from iterbatch.repeater import as_micro_batch, has_frozen_prefix
from iterbatch.strategy import make_strategy
from iterbatch.training.loop import fit
from iterbatch.training.passes import make_optimizer, schedule, warmup_share

BATCHES, TEXT = 12, blocks(24)


def _batches(micro=1):
    """The text as Transformers takes it: labels at their own places."""
    rows = torch.from_numpy(TEXT).long()
    windows = rows.split(2)
    made = [{"input_ids": each, "labels": each.clone()} for each in windows]
    return [made[at : at + micro] if micro > 1 else made[at] for at in range(0, len(made), micro)]


def _ours(model, strategy, micro=1):
    """What our own loop makes of the same text: its losses and its adapter."""
    count = BATCHES // micro
    step = make_step(model, epochs(count))
    stream = BatchStream(Blocks.of(TEXT), 2, micro, seed=0)
    order = [
        index
        for batch in (next(stream) for _ in range(count))
        for each in batch.micro_batches
        for index in each.blocks
    ]
    records = list(fit(strategy, BatchStream(Blocks.of(TEXT), 2, micro, seed=0), step))
    return [record.losses for record in records], copy_adapter(model), order


def _in_order(order, micro=1):
    rows = torch.from_numpy(TEXT).long()[order].split(2)
    made = [{"input_ids": each, "labels": each.clone()} for each in rows]
    return [made[at : at + micro] if micro > 1 else made[at] for at in range(0, len(made), micro)]


def _scheduled(optimizer, count):
    """Our own schedule as PyTorch has it: one step a batch."""
    rise = warmup_share(0.03, count)
    return LambdaLR(
        optimizer, lambda done: schedule(min(max(1 - 0.5 / count, 0.5), done / count + 0.5 / count), rise)
    )


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("placement", ["at_once", "spaced"])
def test_the_same_weights_as_our_own_loop(llama, micro, placement):
    knobs = {"loss_threshold": 2.75, "placement": placement, "gap": 2}
    losses, adapter, order = _ours(llama(), make_strategy("abr", knobs, 0), micro)
    model = llama()
    optimizer = make_optimizer(model, LR, 0.0)
    scheduler = _scheduled(optimizer, BATCHES // micro)
    repeater = iterbatch.Repeater(model, optimizer, "abr", scheduler=scheduler, clip_norm=1.0, **knobs)
    assert repeater.reuses
    assert [repeater(batch).losses for batch in _in_order(order, micro)] == losses
    ours = copy_adapter(model)
    assert all(torch.equal(ours[name], adapter[name]) for name in adapter)
    assert repeater.ledger.flops_saved > 0
    assert any(len(each) > 1 for each in losses) == (placement == "at_once")


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_with_the_prefix_or_whole_is_the_same_training(llama, padding):
    batches = _batches()
    for batch in batches:
        mask = torch.ones_like(batch["input_ids"])
        if padding != "none":
            hidden = slice(-3, None) if padding == "right" else slice(None, 3)
            mask[0, hidden], batch["labels"][0, hidden] = 0, -100
        batch["attention_mask"] = mask
    adapters, losses = [], []
    for reuse in (True, False):
        model = llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # Adam would blow up the last digits
        repeater = iterbatch.Repeater(model, optimizer, "fixed", reuse=reuse, max_repeats=3)
        assert repeater.reuses == reuse
        losses += [[loss for batch in batches for loss in repeater(batch).losses]]
        adapters.append(copy_adapter(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-4) for name in adapters[0])


class _Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x)


def _points(count=20):
    random = torch.Generator().manual_seed(1)
    xs = torch.randn(count, 8, 4, generator=random)
    return [(x, x.sum(dim=1, keepdim=True)) for x in xs]


def _squares(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def test_any_model_is_trained_as_a_loop_by_hand_trains_it():
    by_hand, ours = _Line(), _Line()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    for batch in _points():
        for _ in range(2):
            _squares(by_hand, batch).backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05, momentum=0.9)
    repeater = iterbatch.Repeater(ours, optimizer, "fixed", loss=_squares, clip_norm=0.5, max_repeats=2)
    records = [repeater(batch) for batch in _points()]
    assert not repeater.reuses
    assert [record.repeats_done for record in records] == [2] * 20
    for one, two in zip(by_hand.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, two)


def test_hard_batches_get_more_passes_and_a_budget_ends_it():
    model = _Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    repeater = iterbatch.Repeater(model, optimizer, "abr", loss=_squares, loss_threshold=2.0, budget=15)
    records = []
    for batch in _points(100):
        records.append(repeater(batch))
        if repeater.exhausted:
            break
    assert repeater.ledger.updates == 15
    early = records[:-1]
    assert {record.repeats_done for record in early} > {1}
    assert all(record.repeats_done == max(1, min(5, int(record.initial_loss / 2))) for record in early)


def test_a_scheduler_steps_once_a_batch():
    model = _Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda done: 1 / (1 + done))
    repeater = iterbatch.Repeater(
        model, optimizer, "fixed", loss=_squares, scheduler=scheduler, max_repeats=3
    )
    rates = [repeater(batch).learning_rate for batch in _points(4)]
    assert rates == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert scheduler.last_epoch == 4


def test_accelerate_gives_what_plain_pytorch_gives():
    from accelerate import Accelerator

    weights = []
    for accelerated in (False, True):
        model = _Line()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        accelerator = Accelerator(cpu=True) if accelerated else None
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
        repeater = iterbatch.Repeater(
            model, optimizer, "abr", loss=_squares, accelerator=accelerator, loss_threshold=1.0
        )
        for batch in _points():
            repeater(batch)
        weights.append([each.detach().clone() for each in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_a_window_weighs_its_micro_batches_by_their_tokens(llama):
    """One update on two unequal micro-batches is that on both together."""
    rows = torch.from_numpy(TEXT).long()
    losses = []
    for split in ([3], [1, 2]):
        model = llama()
        repeater = iterbatch.Repeater(
            model, make_optimizer(model, LR, 0.0), "fixed", reuse=False, max_repeats=2
        )
        record = repeater([{"input_ids": each, "labels": each} for each in rows[:3].split(split)])
        losses += [record.losses]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_is_not_finite_changes_nothing():
    model = _Line()
    before = copy.deepcopy(model.state_dict())
    repeater = iterbatch.Repeater(
        model, torch.optim.AdamW(model.parameters(), lr=0.1), "fixed", loss=_squares
    )
    x, y = _points(1)[0]
    record = repeater((x * math.nan, y))
    assert (record.repeats_done, record.skipped_updates) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reuse", [True, False])
def test_learnable_measures_on_a_probe(llama, reuse):
    model = llama(dropout=0.1)
    batches = _batches()
    optimizer = make_optimizer(model, LR, 0.0)
    with pytest.raises(ConfigError, match="never trained on"):
        iterbatch.Repeater(model, optimizer, "learnable")
    knobs = {"probe_rate": 1.0, "probe_budget": 1.0}
    repeater = iterbatch.Repeater(model, optimizer, "learnable", probe=batches[:2], reuse=reuse, **knobs)
    probe, scored = repeater._step.probe, []
    repeater._step.probe = lambda number: scored.append(probe(number)) or scored[-1]
    for _ in range(3):
        for batch in batches[2:]:
            assert 1 <= repeater(batch).repeats_done <= 5
    assert model.training
    assert len(scored) > 5
    assert scored[-1] < scored[0]


def test_a_strategy_of_ones_own(tmp_path):
    class Twice(iterbatch.BaseTrainingStrategy):
        def repeats(self, initial_loss):
            return 2

    model = _Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    file = tmp_path / "mine.py"
    file.write_text(
        "import iterbatch\n\n\nclass Thrice(iterbatch.BaseTrainingStrategy):\n"
        "    def repeats(self, initial_loss):\n        return 3\n",
        encoding="utf-8",
    )
    for strategy, passes in ((Twice(), 2), (Twice, 2), (f"{file}:Thrice", 3)):
        repeater = iterbatch.Repeater(model, optimizer, strategy, loss=_squares)
        assert repeater(_points(1)[0]).repeats_done == passes


def test_what_was_learned_goes_on():
    results = []
    for stop in (None, 10):
        model = _Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def made(model=model, optimizer=optimizer):
            return iterbatch.Repeater(model, optimizer, "window", loss=_squares, loss_threshold=1.0)

        repeater = made()
        for number, batch in enumerate(_points(20)):
            if number == stop:
                state = repeater.state_dict()
                repeater = made()
                repeater.load_state_dict(state)
            record = repeater(batch)
        results.append((record, [each.detach().clone() for each in model.parameters()]))
    (first, weights), (second, others) = results
    assert first.losses == second.losses
    assert first.batch == second.batch == 19
    assert all(torch.equal(one, two) for one, two in zip(weights, others, strict=True))


def test_where_a_prefix_can_be_reused(llama):
    assert has_frozen_prefix(llama())
    assert not has_frozen_prefix(llama(layers=(0, 1)))
    assert not has_frozen_prefix(_Line())
    model = llama()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    assert not has_frozen_prefix(model)  # its gradient is not made there


WRONG = {
    "unknown": ({"strategy": "abrr"}, "did you mean 'abr'"),
    "knob": ({"strategy": "abr", "threshold": 2.0}, "'abr' has no knob 'threshold'"),
    "range": ({"strategy": "abr", "max_repeats": 0}, "--max_repeats is 0"),
    "control": ({"strategy": "permuted"}, "made from another arm's records"),
    "base losses": ({"strategy": "excess"}, "needs base losses"),
    "scaled": ({"strategy": "selective"}, "does more than repeat"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_loop_cannot_give_is_said(case):
    settings, message = WRONG[case]
    model = _Line()
    with pytest.raises(ConfigError, match=message):
        iterbatch.Repeater(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=_squares, **settings)


def test_a_batch_that_the_prefix_cannot_take_is_said(llama):
    model = llama()
    repeater = iterbatch.Repeater(model, make_optimizer(model, LR, 0.0), "abr")
    with pytest.raises(ConfigError, match=r"this one: input_ids, labels, position_ids.*reuse=False"):
        repeater({**_batches()[0], "position_ids": torch.arange(16)[None]})
    with pytest.raises(ConfigError, match="this one: Tensor"):
        repeater(torch.zeros(2, 2))


def test_labels_move_to_what_predicts_them():
    ids = torch.tensor([[5, 6, 7, 8]])
    made = as_micro_batch({"input_ids": ids, "labels": torch.tensor([[-100, 6, 7, 8]])})
    assert made.labels.tolist() == [[6, 7, 8, -100]]
    assert made.label_tokens == 3


def test_a_dataloaders_batch_is_one_batch():
    """Its tensors come as a list."""
    from torch.utils.data import DataLoader, TensorDataset

    xs, ys = (torch.cat(each) for each in zip(*_points(), strict=True))
    weights = []
    for loader in (DataLoader(TensorDataset(xs, ys), batch_size=8), _points()):
        model = _Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        repeater = iterbatch.Repeater(model, optimizer, "fixed", loss=_squares)
        for batch in loader:
            repeater(batch)
        weights.append([each.detach().clone() for each in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_repeats_within_autocast_see_the_new_weights():
    model = _Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    repeater = iterbatch.Repeater(model, optimizer, "fixed", loss=_squares, max_repeats=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = repeater(_points(1)[0]).losses
    assert len(set(losses)) == 3


def test_labels_that_are_no_tokens_weigh_alike():
    model = _Line()

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch["x"]), batch["labels"])

    repeater = iterbatch.Repeater(model, torch.optim.SGD(model.parameters(), lr=0.1), "fixed", loss=loss)
    before = [each.detach().clone() for each in model.parameters()]
    record = repeater([{"x": x, "labels": y} for x, y in _points(2)])
    assert record.initial_loss > 0
    assert not all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_a_batch_without_a_label_is_refused_and_a_micro_batch_without_one_counts_nothing(llama):
    model = llama()
    repeater = iterbatch.Repeater(model, make_optimizer(model, LR, 0.0), "fixed")
    batch, other = _batches()[:2]
    silent = {"input_ids": other["input_ids"], "labels": torch.full_like(other["labels"], -100)}
    with pytest.raises(ConfigError, match="no label"):
        repeater(silent)
    losses = []
    for reuse in (True, False):
        model = llama()
        repeater = iterbatch.Repeater(model, make_optimizer(model, LR, 0.0), "fixed", reuse=reuse)
        losses.append(repeater([batch, silent]).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("reuse", [True, False])
def test_modules_keep_their_modes(llama, reuse):
    model = llama(dropout=0.1)
    batches = _batches()
    frozen = model.get_base_model().model.layers[1].mlp.eval()
    knobs = {"probe": batches[:2], "probe_rate": 1.0, "probe_budget": 1.0}
    repeater = iterbatch.Repeater(model, make_optimizer(model, LR, 0.0), "learnable", reuse=reuse, **knobs)
    frozen.eval()
    for batch in batches[2:]:
        repeater(batch)
    assert not frozen.training
    assert model.get_base_model().model.layers[1].training


def test_accelerates_own_accumulation_is_refused():
    from accelerate import Accelerator

    model = _Line()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
        iterbatch.Repeater(model, optimizer, "fixed", loss=_squares, accelerator=accelerator)


def test_an_attention_that_needs_a_mask_is_taken_whole(tiny_folder):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")
    assert not has_frozen_prefix(attach_adapter(base, "float32", ModelConfig(), [1]))
