import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iterbatch.checks import make_config
from iterbatch.data.batch import MicroBatch
from iterbatch.model.base import load_base
from iterbatch.model.cut import CutModel
from iterbatch.model.flops import FlopModel, flop_model
from iterbatch.model.weights import load_model
from iterbatch.training.budget import Allowance, Ledger

ROWS, LENGTH = 2, 64


def _counted(model, backward, repeat=False):
    """FLOPs as torch counts them, with the plain attention kernel: it has no count for the fused one."""
    ids = torch.randint(0, 4096, (ROWS, LENGTH))
    cut, micro = CutModel(model), MicroBatch(ids, ids)
    hidden = cut.prefix(micro)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        nats = cut(hidden if repeat else cut.prefix(micro), micro).sum()
        if backward:
            nats.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"lora_layers": "top:2"},
        {"lora_layers": "top:1"},
        {"lora_layers": "3-5"},
        {"lora_rank": 64, "lora_layers": "top:4"},
        {"lora_targets": ["q_proj", "v_proj"], "lora_layers": "top:3"},
        {"lora_targets": ["down_proj"], "lora_layers": "top:1"},
        {"gradient_checkpointing": True, "lora_layers": "top:4"},
    ],
    ids=str,
)
def test_flop_model_agrees_with_torch(flags):
    config = make_config(dtype="float32", **flags)
    model = load_model(load_base(config), config.model)
    model.train()
    ours = flop_model(model, config.model.gradient_checkpointing)
    shapes = [(ROWS, LENGTH)]
    assert ours.fresh(shapes) == pytest.approx(_counted(model, backward=True), rel=0.02)
    assert ours.repeat(shapes) == pytest.approx(_counted(model, backward=True, repeat=True), rel=0.02)
    if not config.model.gradient_checkpointing:
        with torch.no_grad():
            assert ours.forward(shapes) == pytest.approx(_counted(model, backward=False), rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_supported_architecture(kind, tokenizer, tmp_path):
    """Grouped heads, and for qwen3 heads wider than the hidden size would give."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    extra = {"head_dim": 16} if kind in ("mistral", "qwen3") else {}
    shape = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
        **extra,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = make_config(model_name=str(tmp_path), dtype="float32", max_length=64, lora_layers="top:2")
    model = load_model(load_base(config), config.model)
    model.train()
    assert flop_model(model).fresh([(ROWS, LENGTH)]) == pytest.approx(
        _counted(model, backward=True), rel=0.02
    )
    adapted = {
        name.split(".layers.")[1][0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert adapted == {"1", "2"}


def test_planning_needs_no_weights():
    config = make_config(lora_layers="top:2")
    base = load_base(config)
    planned, loaded = (
        flop_model(load_model(base, config.model, meta=True)),
        flop_model(load_model(base, config.model)),
    )
    assert planned == loaded


def test_top_layers_cost_less_and_their_repeats_less_still():
    costs, ratios = {}, {}
    for layers in ("all", "top:4", "top:2"):
        config = make_config(lora_layers=layers)
        model = flop_model(load_model(load_base(config), config.model, meta=True))
        costs[layers] = model.fresh([(4, 256)])
        ratios[layers] = model.price_ratio([(4, 256)])
    assert costs["top:2"] < costs["top:4"] < costs["all"]
    assert ratios["top:2"] < ratios["top:4"] < ratios["all"] == 1.0


@pytest.mark.parametrize(
    ("unit", "amount", "spent", "fraction", "affords"),
    [
        ("epochs", 10, {"batches": 5}, 0.5, True),
        ("epochs", 10, {"batches": 10}, 1.0, True),  # counted in epochs a repeat is free
        ("flops", 100.0, {"flops_fresh": 60.0, "flops_repeat": 20.0, "flops_probe": 5.0}, 0.85, True),
        ("flops", 100.0, {"flops_fresh": 91.0}, 0.91, False),  # a repeat costs 10
        ("updates", 10, {"updates": 8, "skipped_updates": 1}, 0.9, True),
        ("updates", 10, {"updates": 10}, 1.0, False),
        ("tokens", 100, {"tokens_trained": 95}, 0.95, False),  # a batch has 7 tokens
        ("seconds", 10.0, {"train_seconds": 5.0}, 0.5, True),
    ],
)
def test_allowance(unit, amount, spent, fraction, affords):
    ledger, allowance = Ledger(**spent), Allowance(unit, amount, 10)
    assert allowance.fraction(ledger) == pytest.approx(fraction)
    assert allowance.affords(ledger, repeat_flops=10.0, label_tokens=7) is affords


def test_allowance_ends_at_the_nearest_pass_and_the_schedule_before_one():
    allowance = Allowance("flops", 100.0, 10)
    assert not allowance.exhausted(Ledger(flops_fresh=94.0))
    assert allowance.exhausted(Ledger(flops_fresh=96.0))
    assert (
        0 < allowance.schedule_fraction(Ledger()) < allowance.schedule_fraction(Ledger(flops_fresh=50.0)) < 1
    )
    assert allowance.schedule_fraction(Ledger(flops_fresh=120.0)) == 0.95  # the middle of the last pass


@pytest.mark.parametrize(("unit", "amount"), [("hours", 1.0), ("flops", 0.0), ("flops", float("nan"))])
def test_allowance_refuses_what_pays_for_nothing(unit, amount):
    with pytest.raises(ValueError, match=r"unknown budget unit|pays for nothing"):
        Allowance(unit, amount, 1)


def test_ledger_state_and_clock():
    ledger = Ledger(batches=3, flops_probe=2.0)
    with ledger.clock():
        sum(range(10_000))
    copy = Ledger()
    copy.load_state_dict(ledger.state_dict())
    assert copy == ledger
    assert ledger.train_seconds > 0


def test_a_model_without_adapters_has_no_backward():
    model = FlopModel.of([], hidden=4, vocabulary=8)
    assert model.forward([(1, 1)]) == 64
