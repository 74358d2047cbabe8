import itertools
import math

import numpy as np
import pytest
import torch

from iterbatch.data.batch import Batch, MicroBatch
from iterbatch.errors import RunError
from iterbatch.records.record import BatchRecord
from iterbatch.strategy import STRATEGIES, make_strategy
from iterbatch.strategy.base import MAX_REPEATS
from iterbatch.strategy.controls import noise_repeats
from iterbatch.strategy.original import abr_repeats, abr_threshold, window_repeats
from iterbatch.strategy.scheduler import VERSION, Probe
from iterbatch.strategy.threshold import Threshold, auto_repeats, running_quantile


class ScriptedStep:
    """``step`` from a list of initial losses: no model, no time. Every pass lowers the loss by a tenth."""

    price_ratio, probe_price = 0.5, 0.05

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

    def probe(self, number):
        self.probes += 1
        return 3.0 - 0.01 * self.probes + 0.001 * math.sin(self.probes)

    def noise_scale(self):
        return 8.0 / (1 + self.fresh % 5)

    def affords_part(self, batch, number, parts):
        return True

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


def test_the_threshold_that_repeats_a_share():
    losses = np.linspace(3, 4, 1001)
    for share in (0.1, 1 / 3, 0.5):
        threshold = abr_threshold(share, losses)
        repeated = np.mean([abr_repeats(loss, threshold, 5) > 1 for loss in losses])
        assert repeated == pytest.approx(share, abs=0.002)
    words = STRATEGIES["abr"].advice(losses)
    assert words == "--loss_threshold 1.95 repeats a tenth of them, 1.83 a third, 1.75 half"


def test_abr_says_before_training_that_it_will_hardly_repeat():
    assert "repeated from 4.00 on: hardly any will be" in make_strategy("abr", {}, 0).foresee(3.3)
    assert make_strategy("abr", {}, 0).foresee(4.1) == ""
    assert "gets all 5 passes from 10.00 on" in make_strategy("abr", {}, 0).foresee(10.5)
    assert make_strategy("abr", {"loss_threshold": "auto"}, 0).foresee(3.3) == ""


@pytest.mark.parametrize(
    ("loss", "threshold", "spread", "most", "repeats"),
    [
        (3.0, 3.0, 0.1, 5, 1),  # at it
        (2.9, 3.0, 0.1, 5, 1),
        (3.01, 3.0, 0.1, 5, 2),  # above it
        (3.11, 3.0, 0.1, 5, 3),  # a whole spread more
        (3.35, 3.0, 0.1, 5, 5),
        (9.0, 3.0, 0.1, 5, 5),  # cap
        (9.0, 3.0, 0.1, 1, 1),
        (3.5, 3.0, 0.0, 5, 1),  # losses that do not scatter are no evidence
        (3.5, math.inf, 0.0, 5, 1),  # nor are too few
    ],
)
def test_auto_rule(loss, threshold, spread, most, repeats):
    assert auto_repeats(loss, threshold, spread, most) == repeats


def test_a_running_quantile_follows_a_falling_loss():
    line = [5 - 0.1 * place for place in range(32)]
    assert running_quantile(line, 0.67)[0] == pytest.approx(5 - 0.1 * 32)
    random = np.random.default_rng(0)
    for scale in (1.0, 100.0):  # free of scale
        losses = scale * (4 - 0.01 * np.arange(2000) + 0.2 * random.normal(size=2000))
        threshold, above = Threshold("q0.8"), []
        for loss in losses:
            above.append(loss > threshold.now[0])
            threshold.note(loss)
        assert np.mean(above[32:]) == pytest.approx(0.2, abs=0.04)


# -- window ------------------------------------------------------------------------------------------ -----

RISING, FALLING, FLAT = [3.0, 3.1, 3.3, 3.3, 3.5], [3.5, 3.3, 3.3, 3.1, 3.0], [3.2, 3.3, 3.2, 3.3, 3.2]
WIDE = [2.9, 3.6, 2.9, 3.6, 3.2]  # the mean of FLAT, and more volatile


@pytest.mark.parametrize("extra", [1, 2, 3, 4])
def test_each_signal_of_the_window_changes_decisions(extra):
    """One signal moves, the two others stay."""
    most = 1 + extra

    def at(window, loss):
        return window_repeats(window, loss, 2.0, extra)

    assert (at(RISING, 3.24), at(FALLING, 3.24)) == (most, 1)  # the trend
    assert (at(FLAT, 3.24), at(FLAT, 3.3)) == (1, 2)  # the current loss
    assert (at(FLAT, 3.3), at(WIDE, 3.3)) == (2, 1)  # the volatility
    low = [window_repeats(window, 1.9, 2.0, extra) for window in (RISING, FALLING)]
    assert low == [1, 1]  # rising and low is weighed, by a loss far below the window's


@pytest.mark.parametrize(
    ("earlier", "loss", "extra", "repeats"),
    [
        ([3.0, 3.1, 3.2, 3.3, 3.4], 3.0, 4, 5),  # rising and high
        ([3.4, 3.3, 3.2, 3.1, 3.0], 3.0, 4, 1),  # falling and high: moderate, and below the mean
        ([1.8, 1.7, 1.6, 1.5, 1.4], 1.9, 4, 1),  # falling and low, though above the mean
        ([1.0, 1.1, 1.2, 1.3, 1.4], 1.9, 4, 5),  # rising and low: moderate, and far above
        ([3.0, 3.0, 3.0, 3.0, 3.0], 3.0, 4, 1),  # constant
        ([3.0, 3.9, 2.2, 4.1, 3.1], 3.3, 4, 1),  # volatile: a trend within the noise is none
        ([2.0, 2.1, 2.2, 2.3, 2.4], 2.0, 4, 1),  # a loss equal to the threshold is not high
        (FLAT, 3.24 + 2.5 * float(np.std(FLAT)), 4, 3),  # a pass for each whole volatility
        (FLAT, 9.0, 4, 5),
        (RISING, 3.3, 9, 5),  # the total stays within 5
        (RISING, 3.3, 0, 1),
    ],
)
def test_window_rule(earlier, loss, extra, repeats):
    assert window_repeats(earlier, loss, 2.0, extra) == repeats


def test_the_current_loss_enters_the_window_at_the_end():
    window = make_strategy("window", {}, 0)
    step = ScriptedStep([3.0, 3.1, 3.2, 3.3, 3.4, 3.35, 3.0])
    done = [window.train_batch(Batch(()), step).repeats_done for _ in range(7)]
    assert done == [1, 1, 1, 1, 1, 2, 2]  # none before five earlier losses are there


@pytest.mark.parametrize(
    ("rows", "scale", "repeats"),
    [(32, 64.0, 1), (32, 20.0, 1), (32, 16.0, 2), (32, 1.0, 5), (32, math.inf, 1), (32, math.nan, 1)],
)
def test_noise_rule(rows, scale, repeats):
    assert noise_repeats(rows, scale, 5) == repeats


# -- the contract ------------------------------------------------------------------------------------ -----


SOURCE = [1, 1, 2, 1, 3, 1, 1, 4]  # passes of each batch of an arm that controls are made from
ROWS = torch.arange(8).view(4, 2)
BATCH = Batch((MicroBatch(ROWS, ROWS),))


KEPT = {
    "version": VERSION,
    "probes": [Probe((0.0, 0.0), (0.02, 0.018, 0.016), 0.02).row() for _ in range(20)],
}


def _made(name, seed=0, **knobs):
    source = KEPT if STRATEGIES[name].made_from == "scheduler" else SOURCE
    return make_strategy(name, knobs, seed, source)


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


PLACED = [name for name, kind in STRATEGIES.items() if kind.gives_k]


@pytest.mark.parametrize(
    ("name", "placement"),
    [*((name, "at_once") for name in STRATEGIES), *((name, "spaced") for name in PLACED)],
)
def test_same_seed_same_decisions_also_after_a_saved_state(name, placement):
    def decisions(strategy, losses):
        step = ScriptedStep(losses)
        step.held = [held for _, held, _ in getattr(strategy.placing, "waiting", [])]
        return [
            (strategy.train_batch(BATCH, step).repeats_done, tuple(step.told), len(step.revisited))
            for _ in losses
        ]

    losses = _losses(400)
    knobs = {"probe_rate": 0.5, "placement": placement, "block": 8, "loss_threshold": "auto"}
    whole = decisions(_made(name, 3, **knobs), losses)
    first = _made(name, 3, **knobs)
    start = decisions(first, losses[:200])
    second = _made(name, 99, **knobs)
    second.load_state_dict(first.state_dict())
    second.placing.load_state_dict(first.placing.state_dict())
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


def test_permuted_within_blocks_keeps_when():
    source = [1] * 8 + [3, 1] * 4 + [5] * 8
    strategy = make_strategy("permuted", {"block": 8}, 0, source)
    dealt = [strategy.repeats(3.0) for _ in range(48)]
    blocks = [sorted(dealt[start : start + 8]) for start in range(0, 48, 8)]
    assert blocks == [[1] * 8, [1] * 4 + [3] * 4, [5] * 8] * 2


def test_profile_keeps_the_batch_number_and_random_twins_a_learner():
    profile = make_strategy("profile", {}, 0, SOURCE)
    assert [profile.repeats(loss) for loss in _losses(10)] == [*SOURCE, 4, 4]


@pytest.mark.parametrize("name", ["permuted", "random", "higher_lr", "small_batches", "profile", "inverse"])
def test_a_control_without_its_source_is_refused(name):
    with pytest.raises(RunError, match="no batches"):
        make_strategy(name, {}, 0, [])


@pytest.mark.parametrize("block", [0, 8])
def test_inverse_has_abrs_own_histogram_upside_down(block):
    losses = np.random.default_rng(0).uniform(1, 9, 600).tolist()
    abr = [record.repeats_done for record in _control("abr", losses)[0]]
    strategy = make_strategy("inverse", {"block": block}, 0, abr)
    inverse = [strategy.repeats(loss) for loss in losses]
    assert sorted(inverse) == sorted(abr)
    assert np.corrcoef(losses[8:], inverse[8:])[0, 1] < -0.5


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


@pytest.mark.parametrize("name", PLACED)
def test_every_strategy_that_gives_k_can_be_spaced(name):
    losses = [*_losses(120), *[0.1] * 200]
    at_once = _control(name, losses, probe_rate=0.0)[0]
    records, step = _control(name, losses, placement="spaced", probe_rate=0.0)
    assert [record.repeats_done for record in records] == [1] * len(losses)
    planned = [record.repeats_planned for record in records]
    if name in ("abr", "window", "fixed", "permuted", "inverse"):  # whose rules do not ask what was done
        assert planned == [record.repeats_planned for record in at_once] or name == "spaced"
    for held, at in step.revisited:
        assert (at - held) % 8 == 0
    for held in {held for held, _ in step.revisited}:
        assert sum(each == held for each, _ in step.revisited) <= planned[held] - 1


def test_a_buffer_lets_go_of_what_waits_longest():
    strategy = make_strategy("fixed", {"placement": "spaced", "max_repeats": 3, "gap": 2, "buffer": 3}, 0)
    step = ScriptedStep([3.0] * 30)
    for _ in range(30):
        strategy.train_batch(BATCH, step)
        assert len(step.held) <= 3
    assert {at - held for held, at in step.revisited} == {2}  # a second repeat never has room


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


def test_spaced_is_spaced_whatever_the_placement_of_others():
    assert make_strategy("spaced", {"placement": "at_once", "gap": 3}, 0).placing.gap == 3
