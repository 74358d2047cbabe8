"""Repeats inside Lightning: one pass a batch is automatic optimisation to the last bit."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from iterbatch.errors import ConfigError
from iterbatch.integrations.lightning import RepeatMixin

pytestmark = pytest.mark.filterwarnings("ignore")
POINTS = torch.randn(26, 4, generator=torch.Generator().manual_seed(0))


class Line(lightning.LightningModule):
    def __init__(self, schedule="step", dropout=0.2):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 1))
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        (x,) = batch
        loss = nn.functional.mse_loss(self.net(x), x.sum(dim=1, keepdim=True))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        (x,) = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), x.sum(dim=1, keepdim=True)))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        if self.schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (1 + done))
        return [optimizer], [{"scheduler": scheduler, "interval": self.schedule, "frequency": 2}]


class Repeating(RepeatMixin, Line):
    pass


def _loader():
    return DataLoader(TensorDataset(POINTS), batch_size=4)


def _fitted(module, folder, resume=None, callbacks=(), **settings):
    lightning.seed_everything(5, verbose=False)
    if settings.get("precision") == "float16":  # a CPU has its gradients scaled only where it is told so
        scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024))
        settings = {**settings, "precision": None, "plugins": [scaled]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
            **{"max_epochs": 3} | settings,
        )
        trainer.fit(module, _loader(), _loader(), ckpt_path=resume)
    return trainer


def _weights(module):
    return [each.detach().clone() for each in module.parameters()]


def _equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


SETTINGS = {
    "plain": ({}, {}, "step"),
    "by epoch": ({}, {}, "epoch"),
    "accumulated": ({"accumulate_grad_batches": 3}, {"accumulate": 3}, "step"),
    "clipped": ({"gradient_clip_val": 0.1}, {"clip_norm": 0.1}, "step"),
    "both": (
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {"accumulate": 2, "clip_norm": 0.1},
        "step",
    ),
    "bfloat16": ({"precision": "bf16-mixed"}, {}, "step"),
    "float16": ({"gradient_clip_val": 0.1, "precision": "float16"}, {"clip_norm": 0.1}, "step"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_pass_a_batch_is_automatic_optimisation(tmp_path, setting):
    theirs, ours, schedule = SETTINGS[setting]
    plain, one, two = (
        Line(schedule=schedule),
        Repeating(schedule=schedule, strategy="baseline", **ours),
        Repeating(schedule=schedule, strategy="fixed", knobs={"max_repeats": 2}, **ours),
    )
    automatic = _fitted(plain, tmp_path, **theirs)
    shared = {name: value for name, value in theirs.items() if name == "precision"}
    by_hand = _fitted(one, tmp_path, **shared)
    _fitted(two, tmp_path, **shared)
    assert _equal(_weights(plain), _weights(one))
    assert not _equal(_weights(plain), _weights(two))
    assert by_hand.global_step == automatic.global_step == len(one.repeats.records)
    assert by_hand.callback_metrics.keys() == automatic.callback_metrics.keys()
    for name, value in automatic.callback_metrics.items():
        assert by_hand.callback_metrics[name] == value
    assert two.repeats.ledger.updates == 2 * one.repeats.ledger.updates


def test_repeats_are_those_of_a_loop_by_hand(tmp_path):
    module = Repeating(
        strategy="abr", knobs={"loss_threshold": 1.0}, accumulate=2, clip_norm=0.5, dropout=0.0
    )
    _fitted(module, tmp_path)
    by_hand = Line(dropout=0.0)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.02)
    by_hand.log = lambda *_, **__: None
    done, losses = 0, []
    for _ in range(3):
        batches = list(_loader())
        for start in range(0, len(batches), 2):
            window, passes, mine = batches[start : start + 2], 1, []
            while len(mine) < passes:
                total = 0.0
                for batch in window:
                    loss = by_hand.training_step(batch, 0) / 2
                    loss.backward()
                    total += float(loss)
                nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                mine.append(total)
                passes = max(1, min(5, int(mine[0])))
            losses.append(mine)
            if (start + len(window)) % 2 == 0:
                done += 1
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + done)
    assert [len(each) for each in losses] == [record.repeats_done for record in module.repeats.records]
    for ours, theirs in zip(module.repeats.records, losses, strict=True):
        assert ours.losses == pytest.approx(theirs, rel=1e-5)
    assert max(record.repeats_done for record in module.repeats.records) > 1


RULES = {
    "abr": {"loss_threshold": 1.0},
    "window": {"loss_threshold": 0.1, "window_size": 2},
    "spaced": {"loss_threshold": 1.0, "placement": "spaced", "gap": 2},
}


@pytest.mark.parametrize("rule", RULES)
def test_resumed_from_a_checkpoint_it_is_what_it_would_have_been(tmp_path, rule):
    def fitted(folder, resume=None):  # without dropout: Lightning keeps no random states
        module = Repeating(strategy={"spaced": "abr"}.get(rule, rule), knobs=RULES[rule], dropout=0.0)
        keep = ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}")
        _fitted(module, tmp_path, resume=resume, callbacks=[keep], max_epochs=4)
        return module

    whole = fitted("whole")
    again = fitted("again", tmp_path / "whole" / "epoch=1.ckpt")
    assert _equal(_weights(whole), _weights(again))
    ends = whole.repeats.records[14:]
    assert [each.losses for each in again.repeats.records] == [each.losses for each in ends]
    assert whole.repeats.ledger.updates == again.repeats.ledger.updates > whole.repeats.ledger.batches


def test_a_budget_stops_training(tmp_path):
    module = Repeating(strategy="fixed", knobs={"max_repeats": 3}, budget=20)
    _fitted(module, tmp_path, max_epochs=10)
    assert module.repeats.ledger.updates == 20


def test_learnable_measures_on_a_probe(tmp_path):
    module = Repeating(
        strategy="learnable", knobs={"probe_rate": 1.0, "probe_budget": 1.0}, probe=[[POINTS[:4]]]
    )
    _fitted(module, tmp_path)
    assert module.training
    assert all(1 <= record.repeats_done <= 5 for record in module.repeats.records)


class TwoOptimizers(RepeatMixin, Line):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


class NoTensor(Line):
    def training_step(self, batch, batch_idx):
        return 3


def test_what_cannot_be_repeated_is_said(tmp_path):
    class Wrong(RepeatMixin, nn.Linear):
        pass

    class ReturnsThree(RepeatMixin, NoTensor):
        pass

    with pytest.raises(ConfigError, match="no LightningModule"):
        Wrong(2, 2)
    with pytest.raises(ConfigError, match="one optimizer"):
        _fitted(TwoOptimizers(), tmp_path)
    with pytest.raises(ConfigError, match="ReduceLROnPlateau"):
        _fitted(Repeating(schedule="plateau"), tmp_path)
    with pytest.raises(ConfigError, match="must return the loss"):
        _fitted(ReturnsThree(), tmp_path)
    with pytest.raises(ConfigError, match="min_epochs"):
        _fitted(Repeating(budget=10), tmp_path, min_epochs=2)

    class Clips(Line):
        def configure_gradient_clipping(self, *_):
            pass

    class RepeatsClips(RepeatMixin, Clips):
        pass

    with pytest.raises(ConfigError, match="overrides configure_gradient_clipping"):
        RepeatsClips()
    with pytest.raises(ConfigError, match="from 1 on"):
        Repeating(accumulate=0)
    with pytest.raises(ConfigError, match="did you mean 'abr'"):
        Repeating(strategy="abrr")
