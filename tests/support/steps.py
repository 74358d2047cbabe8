"""A step over a small model, and what tests drive it with."""

import torch

from iterbatch.model.cut import CutModel
from iterbatch.model.flops import flop_model
from iterbatch.reuse.prefix import PrefixSource
from iterbatch.runtime.processes import make_accelerator
from iterbatch.training.budget import Allowance, Ledger
from iterbatch.training.charges import Account
from iterbatch.training.passes import Passes, make_optimizer
from iterbatch.training.step import StepSettings, TrainingStep

LR = 0.01


def make_step(
    model,
    allowance,
    *,
    lr=LR,
    clip=1.0,
    reuse=True,
    source=None,
    batch_at=None,
    accelerator=None,
    extras=None,
):
    """A step with a fresh optimizer over the adapters of a model as they are."""
    accelerator = accelerator or make_accelerator("no")
    placed, optimizer = accelerator.prepare(CutModel(model), make_optimizer(model, lr, 0.0))
    passes = Passes(placed, optimizer, accelerator, clip)
    account = Account(flop_model(model), Ledger(), allowance)
    source = source or PrefixSource(accelerator.unwrap_model(placed), accelerator.device)
    return TrainingStep(passes, account, StepSettings(lr, reuse=reuse), source, batch_at, extras)


def epochs(batches):
    """An allowance of so many batches."""
    return Allowance("epochs", batches, batches)


def blocks(count, length=16, seed=0):
    """(count, length) random tokens."""
    return torch.randint(3, 4000, (count, length), generator=torch.Generator().manual_seed(seed)).numpy()
