import math

import numpy as np
import pytest
from synthetic_stream import SyntheticStep, play

from iterbatch.config import StrategyConfig
from iterbatch.data_loader import Batch
from iterbatch.record import BatchRecord
from iterbatch.scheduler import MAX_REPEATS, GainLearner, SchedulerLLaMA, stopping_rule
from iterbatch.strategy import STRATEGIES, LearnableSchedulingStrategy, abr_repeats, make_strategy, window_repeats


class ScriptedStep:
    """``step`` from a list of initial losses: no model, no time. Every pass lowers the loss by a tenth."""

    price_ratio, learning_rate = 0.5, 0.01

    def __init__(self, losses, affordable=10**9):
        self.losses, self.affordable = iter(losses), affordable
        self.fresh = self.repeats = self.probes = 0

    def __call__(self, batch):
        self.fresh += 1
        self.loss = next(self.losses)
        return self.loss

    def again(self):
        self.repeats += 1
        self.affordable -= 1
        self.loss *= 0.9
        return self.loss

    def affords_repeat(self):
        return self.affordable > 0

    def snapshot(self):
        return "adapter"

    def score(self, batch, adapter):
        assert adapter == "adapter"
        self.probes += 1
        return 3.0

    def record(self, losses, planned):
        return BatchRecord(self.fresh - 1, 0, losses[0], losses, planned, len(losses), 0.01, 1.0, 100, 1.0, 0.0)


# -- abr -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "threshold", "most", "repeats"),
    [
        (1.9, 2.0, 5, 1),  # below
        (2.0, 2.0, 5, 1),  # equal: not above
        (2.1, 2.0, 5, 1),  # above, ratio below 2
        (3.999, 2.0, 5, 1),
        (4.0, 2.0, 5, 2),
        (9.9, 2.0, 5, 4),
        (10.0, 2.0, 5, 5),
        (50.0, 2.0, 5, 5),  # cap
        (50.0, 2.0, 1, 1),
        (0.0, 2.0, 5, 1),
        (3.3, 1.0, 2, 2),
    ],
)
def test_abr_rule(loss, threshold, most, repeats):
    assert abr_repeats(loss, threshold, most) == repeats


# -- window ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "extra", "repeats"),
    [
        ([9.0, 9.0, 9.0, 9.0], 4, 1),  # not yet full
        ([3.0, 3.1, 3.2, 3.3, 3.4], 4, 5),  # rising and high
        ([3.4, 3.3, 3.2, 3.1, 3.0], 4, 3),  # falling and high: moderate
        ([1.4, 1.3, 1.2, 1.1, 1.0], 4, 1),  # falling and low
        ([1.0, 1.1, 1.2, 1.3, 1.4], 4, 3),  # rising and low: moderate
        ([3.0, 3.0, 3.0, 3.0, 3.0], 4, 3),  # constant and high
        ([1.0, 1.0, 1.0, 1.0, 1.0], 4, 3),  # constant and low
        ([3.0, 3.9, 2.2, 4.1, 3.1], 4, 3),  # volatile: a trend within the noise is none
        ([2.0, 2.0, 2.0, 2.0, 2.0], 1, 1),  # level equal to the threshold is not high: half of 1, rounded down
        ([2.1, 2.1, 2.1, 2.1, 2.1], 1, 2),  # high: half of 1, rounded up
        ([1.4, 1.3, 1.2, 1.1, 1.0], 1, 1),
        ([3.0, 3.1, 3.2, 3.3, 3.4], 9, 5),  # the total stays within 5
        ([9.0, 9.0, 3.0, 3.1, 3.2, 3.3, 3.4], 4, 5),  # only the last five count
        ([3.0, 3.1, 3.2, 3.3, 3.4], 0, 1),
    ],
)
def test_window_rule(losses, extra, repeats):
    assert window_repeats(losses, 5, 2.0, extra) == repeats


# -- the contract --------------------------------------------------------------------------------------------------------------------------


def _losses(count=60):
    return (4 + 3 * np.random.default_rng(0).normal(size=count)).clip(0.1).tolist()


@pytest.mark.parametrize("name", STRATEGIES)
def test_contract(name):
    strategy, step = make_strategy(name, StrategyConfig(), seed=0), ScriptedStep(_losses())
    records = [strategy.train_batch(Batch(()), step) for _ in range(60)]
    assert step.fresh == 60
    assert sum(record.repeats_done for record in records) == step.fresh + step.repeats
    for record in records:
        assert 1 <= record.repeats_done <= record.repeats_planned <= MAX_REPEATS
        assert len(record.losses) == record.repeats_done
        assert record.losses[0] == record.initial_loss


@pytest.mark.parametrize("name", STRATEGIES)
def test_same_seed_same_decisions_also_after_a_saved_state(name):
    def decisions(strategy, losses):
        step = ScriptedStep(losses)
        return [strategy.train_batch(Batch(()), step).repeats_done for _ in losses]

    losses = _losses(400)
    knobs = StrategyConfig(probe_rate=0.5)
    whole = decisions(make_strategy(name, knobs, seed=3), losses)
    first = make_strategy(name, knobs, seed=3)
    start = decisions(first, losses[:200])
    second = make_strategy(name, knobs, seed=99)
    second.load_state_dict(first.state_dict())
    assert start + decisions(second, losses[200:]) == whole


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loss_that_is_not_finite_is_no_evidence(name):
    strategy = make_strategy(name, StrategyConfig(max_repeats=5, probe_rate=1.0), seed=0)
    step = ScriptedStep([math.nan, math.inf, 30.0, 30.0, math.nan, 30.0])
    records = [strategy.train_batch(Batch(()), step) for _ in range(6)]
    assert [records[index].repeats_done for index in (0, 1, 4)] == [1, 1, 1]
    assert all(np.isfinite(value) for value in _numbers(strategy.state_dict()))


def _numbers(state):
    if isinstance(state, dict):
        for value in state.values():
            yield from _numbers(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _numbers(value)
    elif isinstance(state, float):
        yield state


def test_repeats_stop_where_the_budget_ends():
    strategy, step = make_strategy("abr", StrategyConfig(), seed=0), ScriptedStep([50.0, 50.0, 50.0], affordable=3)
    records = [strategy.train_batch(Batch(()), step) for _ in range(3)]
    assert [record.repeats_planned for record in records] == [5, 5, 5]
    assert [record.repeats_done for record in records] == [4, 1, 1]


def test_max_repeats_means_passes_for_abr_and_extra_passes_for_window():
    losses = [50.0] * 10
    abr, window = (make_strategy(name, StrategyConfig(max_repeats=2), seed=0) for name in ("abr", "window"))
    assert max(abr.train_batch(Batch(()), step).repeats_done for step in [ScriptedStep(losses)] for _ in losses) == 2
    assert max(window.train_batch(Batch(()), step).repeats_done for step in [ScriptedStep([30.0 + i for i in range(10)])] for _ in losses) == 3


# -- learnable -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gains", "rate", "price", "repeats"),
    [
        ([1.0, 0.9, 0.1, 0.0, 0.0], 1.0, 0.5, 2),
        ([1.0, 0.9, 0.8, 0.7, 0.6], 1.0, 0.5, 5),
        ([1.0, 0.9, 0.1, 0.9, 0.9], 1.0, 0.5, 2),  # stops at the first pass that does not pay
        ([1.0, 1.0, 1.0, 1.0, 1.0], 1.0, 1.0, 1),  # a tie does not pay
        ([-math.inf] * 5, 0.0, 0.5, 1),  # no evidence
        ([0.0, -0.1, 1.0, 1.0, 1.0], 0.0, 0.1, 1),
    ],
)
def test_stopping_rule(gains, rate, price, repeats):
    assert stopping_rule(gains, rate, price) == repeats


def test_scheduler_without_evidence_trains_once():
    learner = GainLearner(seed=0)
    assert {learner.decide(loss, 0.25, explore=False) for loss in (0.1, 3.0, 30.0)} == {1}
    assert SchedulerLLaMA()(np_to_tensor([[0.0, 1.0], [2.0, -1.0]])).abs().max() == 0


def np_to_tensor(values):
    import torch

    return torch.tensor(values)


def test_probes_end_with_the_first_epoch():
    strategy = LearnableSchedulingStrategy(probe_rate=1.0, seed=0)
    step = ScriptedStep(_losses(40))
    for index in range(40):
        strategy.train_batch(Batch((), index=index, epoch=index // 20), step)
    assert step.probes == 19  # the first epoch's last batch has no unseen successor


def _played(seed=0, batches=4000, **stream):
    """Unprobed batches of the last quarter: (initial loss, passes); and the stream."""
    step, strategy = SyntheticStep(seed=seed, **stream), LearnableSchedulingStrategy(probe_rate=0.5, seed=seed)
    explored = []
    decide = strategy.learner.decide
    strategy.learner.decide = lambda loss, price, explore: (explored.append(explore), decide(loss, price, explore))[1]
    rows = play(strategy, step, batches)
    return rows[-batches // 4 :][~np.array(explored)[-batches // 4 :]], step


def test_learnable_repeats_high_loss_batches_less_where_high_loss_is_noise():
    rows, step = _played(noise=(0.5, 3.0), rate=0.05, drift=0.3, price_ratio=0.25, seed=2)
    low, high = np.quantile(rows[:, 0], [1 / 3, 2 / 3])
    assert rows[rows[:, 0] < low, 1].mean() > 1.3
    assert rows[rows[:, 0] > high, 1].mean() < 1.1
    difference = np.array([probe - truth for probe, truth in step.probed])
    assert abs(difference.mean() / difference.std() * len(difference) ** 0.5) < 3  # the probe's mean is the true gain


def test_learnable_settles_at_one_where_a_repeat_is_not_worth_its_price():
    rows, _ = _played(noise=(0.2, 0.2), rate=0.05, drift=0.3, price_ratio=1.0)
    assert (rows[:, 1] == 1).mean() > 0.85


def test_learnable_settles_at_one_where_rewards_are_shuffled():
    rows, _ = _played(noise=(0.2, 0.2), rate=0.05, drift=0.3, price_ratio=1.0, shuffle_rewards=True)
    assert (rows[:, 1] == 1).mean() > 0.8


def test_learnable_repeats_where_repeats_are_cheap_and_gain():
    rows, _ = _played(noise=(0.2, 0.2), rate=0.05, drift=0.3, price_ratio=0.25)
    assert rows[:, 1].mean() > 1.4
