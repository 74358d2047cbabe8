"""How long training will take, from a short measurement on this machine, before any weights are loaded.

A model of one layer with the real sizes and random weights makes a few passes; their FLOPs a second are taken
for the whole model's. What evaluation, samples and loading take comes on top.
"""

import copy
import dataclasses
import math
import statistics
from typing import Any

import torch

from iterbatch.bench.prepare import Plan
from iterbatch.bench.price import Probe
from iterbatch.config import BenchConfig
from iterbatch.model.base import PRECISION, Base
from iterbatch.model.lora import attach_adapter
from iterbatch.runtime.processes import count, make_accelerator

ROUNDS = 3  # after one to warm up


def flops_per_second(base: Base, config: BenchConfig) -> float:
    """Of fresh passes with this batch size and block length; NaN where there is no memory for a layer.

    Leaves the random states as they were.
    """
    from transformers import AutoModelForCausalLM

    small: Any = copy.deepcopy(base.config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    try:
        with torch.random.fork_rng():
            model = AutoModelForCausalLM.from_config(
                small, dtype=getattr(torch, base.dtype), attn_implementation="sdpa"
            )
            adapted = attach_adapter(model, base.dtype, config.model, [0])
            probe = Probe(adapted, make_accelerator(PRECISION[base.dtype]), config)
            rounds = [probe.round()[0] for _ in range(ROUNDS + 1)][1:]
    except (MemoryError, RuntimeError):  # of torch, on a GPU
        return math.nan
    return probe.fresh_flops / statistics.median(rounds)


def with_seconds(plan: Plan, base: Base, config: BenchConfig) -> Plan:
    """A plan that says how long training an arm will take here.

    Of several processes none tries: the others would have to do the same.
    """
    if count() > 1:
        return plan
    unit, budget = config.training.match, config.training.budget
    if unit == "seconds" and budget is not None:
        return dataclasses.replace(plan, seconds=budget)
    seconds = plan.flops / flops_per_second(base, config)
    of_plan = {"flops": plan.flops, "updates": plan.batches, "tokens": plan.tokens}
    return dataclasses.replace(plan, seconds=seconds * (budget / of_plan[unit] if budget else 1.0))
