import itertools
import math

import numpy as np
import pytest
import torch
from support.synthetic_stream import SyntheticStep, play

from iterbatch.data.batch import Batch, MicroBatch
from iterbatch.errors import RunError
from iterbatch.records.record import BatchRecord
from iterbatch.strategy import STRATEGIES, make_strategy
from iterbatch.strategy.original import LearnableSchedulingStrategy, abr_repeats, window_repeats
from iterbatch.strategy.scheduler import MAX_REPEATS, GainLearner, SchedulerLLaMA, stopping_rule


class ScriptedStep:
    """``step`` from a list of initial losses: no model, no time. Every pass lowers the loss by a tenth."""

    price_ratio, learning_rate = 0.5, 0.01

    def __init__(self, losses, affordable=10**9):
        self.losses, self.affordable = iter(losses), affordable
        self.fresh = self.repeats = self.probes = 0
        self.told, self.held, self.revisited = [], [], []

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

    def scaled(self, batch, rule):
        loss = self(batch)
        if math.isfinite(loss):
            self.told.append(rule(loss))
        return loss

    weighted = scaled

    def part(self, batch, number, parts):
        self.told.append((number, parts))
        if number == 0:
            return self(batch)
        return self.loss

    def forward(self, batch):
        self.waiting = next(self.losses)
        self.losses = itertools.chain([self.waiting], self.losses)
        return self.waiting

    def skip(self):
        self.fresh += 1
        next(self.losses)

    def base_loss(self):
        return 1.0 if self.fresh % 2 else 3.0

    def hold(self):
        self.held.append(self.fresh - 1)
        return self.fresh - 1

    def revisit(self, held):
        assert held in self.held
        self.revisited.append((held, self.fresh - 1))
        return 1.0

    def release(self, held):
        self.held.remove(held)

    def record(self, losses, planned, done=None):
        done = len(losses) if done is None else done
        return BatchRecord(self.fresh - 1, 0, losses[0], losses, planned, done, 0.01, 1.0, 100, 1.0, 0.0)


# -- abr --------------------------------------------------------------------------------------------- -----


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


# -- window ------------------------------------------------------------------------------------------ -----


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
        (
            [2.0, 2.0, 2.0, 2.0, 2.0],
            1,
            1,
        ),  # level equal to the threshold is not high: half of 1, rounded down
        ([2.1, 2.1, 2.1, 2.1, 2.1], 1, 2),  # high: half of 1, rounded up
        ([1.4, 1.3, 1.2, 1.1, 1.0], 1, 1),
        ([3.0, 3.1, 3.2, 3.3, 3.4], 9, 5),  # the total stays within 5
        ([9.0, 9.0, 3.0, 3.1, 3.2, 3.3, 3.4], 4, 5),  # only the last five count
        ([3.0, 3.1, 3.2, 3.3, 3.4], 0, 1),
    ],
)
def test_window_rule(losses, extra, repeats):
    assert window_repeats(losses, 5, 2.0, extra) == repeats


# -- the contract ------------------------------------------------------------------------------------ -----


SOURCE = [1, 1, 2, 1, 3, 1, 1, 4]  # passes of each batch of an arm that controls are made from
ROWS = torch.arange(8).view(4, 2)
BATCH = Batch((MicroBatch(ROWS, ROWS),))


def _made(name, seed=0, **knobs):
    return make_strategy(name, knobs, seed, SOURCE)


def _losses(count=60):
    return (4 + 3 * np.random.default_rng(0).normal(size=count)).clip(0.1).tolist()


@pytest.mark.parametrize("name", STRATEGIES)
def test_contract(name):
    strategy, step = _made(name), ScriptedStep(_losses())
    records = [strategy.train_batch(BATCH, step) for _ in range(60)]
    assert step.fresh == 60
    skipped = sum(record.repeats_done == 0 for record in records)
    assert sum(record.repeats_done for record in records) + skipped == step.fresh + step.repeats
    assert (skipped > 0) == (name == "selective")
    for record in records:
        assert record.repeats_done <= record.repeats_planned <= MAX_REPEATS
        assert len(record.losses) == max(1, record.repeats_done)
        assert record.losses[0] == record.initial_loss


@pytest.mark.parametrize("name", STRATEGIES)
def test_same_seed_same_decisions_also_after_a_saved_state(name):
    def decisions(strategy, losses):
        step = ScriptedStep(losses)
        step.held = [held for _, held, _ in getattr(strategy, "waiting", [])]
        return [
            (strategy.train_batch(BATCH, step).repeats_done, tuple(step.told), len(step.revisited))
            for _ in losses
        ]

    losses = _losses(400)
    whole = decisions(_made(name, 3, probe_rate=0.5), losses)
    first = _made(name, 3, probe_rate=0.5)
    start = decisions(first, losses[:200])
    second = _made(name, 99, probe_rate=0.5)
    second.load_state_dict(first.state_dict())
    rest = decisions(second, losses[200:])
    told, revisits = start[-1][1:]
    assert start + [(done, told + more, revisits + count) for done, more, count in rest] == whole


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loss_that_is_not_finite_is_no_evidence(name):
    strategy = _made(name, max_repeats=5, probe_rate=1.0)
    step = ScriptedStep([math.nan, math.inf, 30.0, 30.0, math.nan, 30.0])
    records = [strategy.train_batch(BATCH, step) for _ in range(6)]
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
    strategy, step = make_strategy("abr", {}, seed=0), ScriptedStep([50.0, 50.0, 50.0], affordable=3)
    records = [strategy.train_batch(Batch(()), step) for _ in range(3)]
    assert [record.repeats_planned for record in records] == [5, 5, 5]
    assert [record.repeats_done for record in records] == [4, 1, 1]


def test_max_repeats_means_passes_for_abr_and_extra_passes_for_window():
    losses = [50.0] * 10
    abr, window = (make_strategy(name, {"max_repeats": 2}, seed=0) for name in ("abr", "window"))
    assert (
        max(abr.train_batch(Batch(()), step).repeats_done for step in [ScriptedStep(losses)] for _ in losses)
        == 2
    )
    assert (
        max(
            window.train_batch(Batch(()), step).repeats_done
            for step in [ScriptedStep([30.0 + i for i in range(10)])]
            for _ in losses
        )
        == 3
    )


# -- controls: each keeps everything of its source but one thing -------------------------------------------


def _control(name, losses, seed=0, **knobs):
    strategy, step = _made(name, seed, **knobs), ScriptedStep(losses)
    return [strategy.train_batch(BATCH, step) for _ in losses], step


def test_permuted_gives_the_sources_run_in_another_order_and_random_its_histogram():
    permuted, _ = _control("permuted", _losses(80))
    runs = [[record.repeats_done for record in permuted[start : start + 8]] for start in range(0, 80, 8)]
    assert all(sorted(run) == sorted(SOURCE) for run in runs)
    assert len({tuple(run) for run in runs}) > 5
    other, _ = _control("permuted", _losses(80), seed=1)
    assert [record.repeats_done for record in other] != [record.repeats_done for record in permuted]
    drawn, _ = _control("random", _losses(4000))
    shares = np.bincount([record.repeats_done for record in drawn], minlength=5)[1:] / 4000
    assert shares == pytest.approx([5 / 8, 1 / 8, 1 / 8, 1 / 8], abs=0.03)


@pytest.mark.parametrize("name", ["permuted", "random", "higher_lr", "small_batches"])
def test_a_control_without_its_source_is_refused(name):
    with pytest.raises(RunError, match="no batches"):
        make_strategy(name, {}, 0, [])


def test_inverse_repeats_the_lowest_losses_as_often_as_abr_the_highest():
    losses = np.random.default_rng(0).uniform(1, 9, 600).tolist()
    abr, inverse = (
        [record.repeats_done for record in _control(name, losses)[0]] for name in ("abr", "inverse")
    )
    assert np.corrcoef(losses, abr)[0, 1] > 0.9
    assert np.corrcoef(losses[8:], inverse[8:])[0, 1] < -0.9
    assert np.mean(inverse) == pytest.approx(np.mean(abr), abs=0.15)


def test_excess_repeats_what_the_base_does_not_share():
    # The base finds every other batch harder by two nats.
    losses = np.random.default_rng(0).uniform(4, 5, 600).tolist()
    records, _ = _control("excess", losses, loss_threshold=1.5)
    done = np.array([record.repeats_done for record in records])[8:]
    assert (
        abs(done[::2].mean() - done[1::2].mean()) > 0.8
    )  # the upper half of ABR's run goes to one of the two


def test_one_pass_at_the_rate_or_weight_that_abr_would_repeat_with():
    losses = [3.0, 4.5, 9.0, 20.0]
    assert _control("scaled_lr", losses)[1].told == [1, 2, 4, 5]
    assert _control("higher_lr", losses)[1].told == [np.mean(SOURCE)] * 4
    weights = _control("weighted", losses)[1].told
    assert weights == [1.0, 2 / 1.5, 4 / (7 / 3), 5 / 3]
    assert all(record.repeats_done == 1 for record in _control("weighted", losses)[0])


def test_spaced_gives_the_same_passes_later():
    losses = [4.5, 6.5, *[1.0] * 60]  # k = 2 and 3
    records, step = _control("spaced", losses)
    assert [record.repeats_planned for record in records[:3]] == [2, 3, 1]
    assert step.revisited == [(0, 8), (1, 9), (1, 17)]
    assert step.held == []


def test_small_batches_makes_mean_k_parts_on_average():
    _, step = _control("small_batches", [3.0] * 400)
    assert len(step.told) / 400 == pytest.approx(np.mean(SOURCE), abs=0.01)
    assert {parts for _, parts in step.told} == {1, 2}


def test_selective_trains_high_losses_more_often():
    losses = np.random.default_rng(0).uniform(1, 9, 2000).tolist()
    records, _ = _control("selective", losses)
    done = np.array([record.repeats_done for record in records])
    assert np.corrcoef(losses, done)[0, 1] > 0.4
    assert done.mean() == pytest.approx(0.5, abs=0.05)


# -- learnable --------------------------------------------------------------------------------------- -----


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
    step, strategy = (
        SyntheticStep(seed=seed, **stream),
        LearnableSchedulingStrategy(probe_rate=0.5, seed=seed),
    )
    explored = []
    decide = strategy.learner.decide
    strategy.learner.decide = lambda loss, price, explore: (
        explored.append(explore),
        decide(loss, price, explore),
    )[1]
    rows = play(strategy, step, batches)
    return rows[-batches // 4 :][~np.array(explored)[-batches // 4 :]], step


def test_learnable_repeats_high_loss_batches_less_where_high_loss_is_noise():
    rows, step = _played(noise=(0.5, 3.0), rate=0.05, drift=0.3, price_ratio=0.25, seed=2)
    low, high = np.quantile(rows[:, 0], [1 / 3, 2 / 3])
    assert rows[rows[:, 0] < low, 1].mean() > 1.3
    assert rows[rows[:, 0] > high, 1].mean() < 1.1
    difference = np.array([probe - truth for probe, truth in step.probed])
    assert (
        abs(difference.mean() / difference.std() * len(difference) ** 0.5) < 3
    )  # the probe's mean is the true gain


def test_learnable_settles_at_one_where_a_repeat_is_not_worth_its_price():
    rows, _ = _played(noise=(0.2, 0.2), rate=0.05, drift=0.3, price_ratio=1.0)
    assert (rows[:, 1] == 1).mean() > 0.85


def test_learnable_settles_at_one_where_rewards_are_shuffled():
    rows, _ = _played(noise=(0.2, 0.2), rate=0.05, drift=0.3, price_ratio=1.0, shuffle_rewards=True)
    assert (rows[:, 1] == 1).mean() > 0.8


def test_learnable_repeats_where_repeats_are_cheap_and_gain():
    rows, _ = _played(noise=(0.2, 0.2), rate=0.05, drift=0.3, price_ratio=0.25)
    assert rows[:, 1].mean() > 1.4
