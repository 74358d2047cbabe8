"""``--compile``: the same passes, compiled for one shape; every other shape runs as before."""

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from iterbatch.checks import make_config
from iterbatch.data.batch import MicroBatch
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.errors import ModelError
from iterbatch.model.attention import NAME, attend
from iterbatch.model.base import load_base
from iterbatch.model.compiled import compiled
from iterbatch.model.cut import CutModel
from iterbatch.model.lora import adapter_parameters
from iterbatch.model.weights import load_model
from iterbatch.runtime.processes import make_accelerator


@pytest.mark.parametrize(
    ("key_heads", "length", "masked"), [(4, 12, False), (2, 12, False), (2, 12, True), (2, 600, False)]
)
def test_attention_equals_transformers_sdpa(monkeypatch, key_heads, length, masked):
    """As the compiler sees it, and in gradients; with a mask, or on a long block, it is Transformers' own."""
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 4 // key_heads
    torch.manual_seed(0)
    states = [torch.randn(2, heads, length, 8, requires_grad=True) for heads in (4, key_heads, key_heads)]
    mask = (
        torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
        if masked
        else None
    )
    results = []
    for function, compiling in ((attend, True), (sdpa_attention_forward, False)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda on=compiling: on)
        output, weights = function(module, *states, mask, scaling=0.3)
        assert weights is None
        results.append((output, *torch.autograd.grad(output.square().sum(), states)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++, which is not here")
def test_compiled_layers_give_the_same_gradients_and_compile_for_one_shape(tiny):
    """One test, because compiling takes seconds: value, gradients, another shape, evaluation, the end."""
    config = make_config(**tiny, lora_layers="top:1")
    model = load_model(load_base(config), config.model).train()
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    accelerator = make_accelerator("no")
    cut = accelerator.prepare_model(CutModel(model))
    blocks = np.random.default_rng(0).integers(3, 4000, (4, 32))
    micro = next(BatchStream(Blocks.of(blocks), 4, 1, seed=0)).micro_batches[0]

    def gradients():
        nats = cut(cut.prefix(micro), micro).sum()
        nats.backward()
        result = [nats.detach(), *(p.grad.clone() for p in adapter_parameters(model).values())]
        cut.zero_grad()
        return result

    plain = gradients()
    with compiled(cut, accelerator, (4, 32)) as made:
        assert made.seconds > 0
        assert model.config._attn_implementation == NAME
        assert all(p.grad is None for p in cut.parameters())
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        for ours, theirs in zip(gradients(), plain, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        short = MicroBatch(micro.input_ids[:3, :20], micro.labels[:3, :20])
        cut(cut.prefix(short), short).sum().backward()
        with torch.no_grad():
            cut.eval()(cut.prefix(micro), micro)
        assert counters["stats"]["unique_graphs"] == graphs  # nothing more was compiled
        cut.train()
        made.warm((3, 20))
        assert counters["stats"]["unique_graphs"] > graphs  # what was asked for is
        known, cold = counters["stats"]["unique_graphs"], made.seconds
        made.warm((3, 20))
        cut(cut.prefix(short), short).sum().backward()
        assert (counters["stats"]["unique_graphs"], made.seconds) == (known, cold)
        cut.zero_grad()
        for ours, theirs in zip(gradients(), plain, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_without_a_compiler_the_flag_is_named(tiny, monkeypatch):
    def fails(*_):
        raise RuntimeError("no C++ compiler was found\nand many lines more")

    config = make_config(**tiny)
    accelerator = make_accelerator("no")
    cut = CutModel(load_model(load_base(config), config.model))
    monkeypatch.setattr(CutModel, "prefix", fails)
    with (
        pytest.raises(
            ModelError,
            match=r"cannot be compiled on this machine \(no C\+\+ compiler was found\).*--compile off",
        ),
        compiled(cut, accelerator, (1, 8)),
    ):
        pass
    assert cut.adapted.layers[0].self_attn.config._attn_implementation == "sdpa"
