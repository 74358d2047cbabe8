"""Prefix reuse inside anyone's loop: the plain Trainer's numbers, with the frozen layers left out."""

import pytest
import torch
from support.steps import blocks
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import iterbatch
from iterbatch.errors import ConfigError
from iterbatch.integrations.transformers import RepeatMixin
from iterbatch.model.lora import copy_adapter
from iterbatch.reuse.in_model import RowsOnDisk, enable_prefix_reuse, reuse_of

TEXT = torch.from_numpy(blocks(12)).long()


class Repeating(RepeatMixin, Trainer):
    pass


def _rows(padding="none"):
    rows = [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in TEXT]
    for row in rows[::2]:
        if padding != "none":
            hidden = slice(-3, None) if padding == "right" else slice(None, 3)
            row["attention_mask"][hidden], row["labels"][hidden] = 0, -100
    return rows


def _trained(model, folder, kind=Trainer, rows=None, **changed):
    ours = {name: changed.pop(name) for name in ("strategy", "knobs") if name in changed}
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "learning_rate": 0.01}
    args = TrainingArguments(
        str(folder),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **settings | changed,
    )
    trainer = kind(model, args, train_dataset=rows or _rows(), **ours)
    set_seed(3)
    trainer.train()
    return trainer, copy_adapter(model)


def _equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("cache", ["batch", "epoch"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_the_plain_trainers_numbers_to_the_last_bit(llama, tmp_path, cache, setting):
    _, expected = _trained(llama(dropout=0.1), tmp_path, **SETTINGS[setting])
    model = llama(dropout=0.1)
    reuse = enable_prefix_reuse(model, cache)
    _, found = _trained(model, tmp_path, **SETTINGS[setting])
    assert _equal(found, expected)
    # Three epochs over 12 rows: kept for a batch, none comes back; kept for an epoch, two of three do.
    assert (reuse.rows_computed, reuse.rows_served) == ((36, 0) if cache == "batch" else (12, 24))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_rows_are_known_again_in_other_company(llama, tmp_path, padding):
    rows = _rows(padding)
    _, expected = _trained(llama(), tmp_path, rows=rows)
    model = llama()
    reuse = enable_prefix_reuse(model, "epoch")
    _, found = _trained(model, tmp_path, rows=rows)
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
    assert (reuse.rows_computed, reuse.rows_served) == (12, 24)


def test_padding_of_another_length_is_served(llama):
    """A row that was padded to 16 is known when it is padded to 20; its loss stays the same."""
    model = llama()
    reuse = enable_prefix_reuse(model, "epoch")
    losses = []
    for length in (16, 20):
        ids = torch.zeros(1, length, dtype=torch.long)
        ids[0, :12] = TEXT[0, :12]
        mask = (torch.arange(length) < 12).long()[None]
        losses.append(
            model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.item()
        )
    assert (reuse.rows_computed, reuse.rows_served) == (1, 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("placement", ["at_once", "spaced"])
def test_repeats_are_served_and_cost_less(llama, tmp_path, accumulation, placement):
    knobs = {"max_repeats": 3, "placement": placement, "gap": 1}
    settings = {"strategy": "fixed", "knobs": knobs, "gradient_accumulation_steps": accumulation}
    whole, expected = _trained(llama(), tmp_path, Repeating, **settings)
    model = llama()
    reuse = iterbatch.enable_prefix_reuse(model)
    ours, found = _trained(model, tmp_path, Repeating, **settings)
    assert _equal(found, expected)
    ledgers = ours.repeats.ledger, whole.repeats.ledger
    assert reuse.rows_served > 0
    assert reuse.rows_computed == 36
    assert ledgers[0].flops_fresh == ledgers[1].flops_fresh
    assert ledgers[0].flops < ledgers[1].flops
    assert ledgers[0].flops_saved > 0 == ledgers[1].flops_saved


def test_a_budget_in_flops_buys_more_passes_with_it(llama, tmp_path):
    count = []
    for reuse in (False, True):
        model = llama()
        if reuse:
            enable_prefix_reuse(model)

        class Budgeted(Repeating):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, match="flops", **kwargs)

        trainer, _ = _trained(
            model, tmp_path, Budgeted, strategy="fixed", knobs={"max_repeats": 3}, num_train_epochs=9
        )
        count.append(trainer.repeats.ledger.updates)
    assert count[1] > count[0]


@pytest.mark.parametrize("cache", ["batch", "epoch"])
def test_evaluation_and_writing_go_the_usual_way(llama, tokenizer, cache):
    model = llama()
    prompt = {"input_ids": TEXT[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    model.eval()
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    hidden = model(input_ids=TEXT[:2], output_hidden_states=True).hidden_states
    model.train()
    reuse = enable_prefix_reuse(model, cache)
    for _ in range(2):
        model(input_ids=TEXT[:2], labels=TEXT[:2]).loss.backward()
    inside = model(input_ids=TEXT[:2], output_hidden_states=True).hidden_states
    assert all(torch.equal(one, two) for one, two in zip(hidden, inside, strict=True))
    model.eval()
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    assert (reuse.rows_computed, reuse.rows_served) == (2, 2)
    reuse.disable()
    assert reuse_of(model) is None
    model.train()
    model(input_ids=TEXT[:2], labels=TEXT[:2])
    assert reuse.rows_computed == 2
    enable_prefix_reuse(model, cache)


def test_tokens_at_other_places_are_other_rows(llama):
    model = llama()
    reuse = enable_prefix_reuse(model, "epoch")
    length = TEXT.shape[1]
    plain = torch.arange(length)[None]
    packed = torch.cat([torch.arange(5), torch.arange(length - 5)])[None]
    losses = [
        float(model(input_ids=TEXT[:1], position_ids=at, labels=TEXT[:1], use_cache=False).loss.detach())
        for at in (plain, packed, plain, packed)
    ]
    assert (reuse.rows_computed, reuse.rows_served) == (2, 2)
    assert losses[0] == losses[2] != losses[1] == losses[3]


def test_the_frozen_layers_are_really_left_out(llama):
    model = llama()
    enable_prefix_reuse(model, "epoch")
    decoder = model.get_base_model().model
    runs = []
    decoder.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        model(input_ids=TEXT[:2], labels=TEXT[:2]).loss.backward()
    assert len(runs) == 1


def test_a_file_that_is_full_keeps_what_it_has(llama, tmp_path):
    row = TEXT.shape[1] * 32 * 4 / 1e9
    model = llama()
    width = model.config.hidden_size
    reuse = enable_prefix_reuse(model, "epoch", folder=tmp_path, limit_gb=row * width / 32 * 4.5)
    for _ in range(2):
        for rows in TEXT.split(2):
            model(input_ids=rows, labels=rows)
    assert (reuse.rows_computed, reuse.rows_served) == (20, 4)
    assert list(tmp_path.iterdir()) == []  # its file has no name, and ends with the process


def test_a_full_disk_ends_the_keeping_and_not_the_training(llama, monkeypatch):
    model = llama()
    reuse = enable_prefix_reuse(model, "epoch")
    model(input_ids=TEXT[:2], labels=TEXT[:2])

    class Full:
        def __getattr__(self, name):
            return getattr(reuse._kept._real, name)

        def write(self, content):  # raw files may write a part of what they are given
            if len(content) > 8:
                return reuse._kept._real.write(content[:8])
            raise OSError(28, "No space left on device")

    reuse._kept._real, reuse._kept._file = reuse._kept._file, Full()
    with pytest.warns(UserWarning, match="no more activations are kept.*No space left"):
        model(input_ids=TEXT[2:4], labels=TEXT[2:4])
    model(input_ids=TEXT[4:6], labels=TEXT[4:6])
    model(input_ids=TEXT[:2], labels=TEXT[:2])
    assert (reuse.rows_computed, reuse.rows_served) == (6, 2)


def test_bfloat16_rows_come_back_as_they_were():
    kept = RowsOnDisk(None, 1.0)
    from iterbatch.reuse.in_model import Rows

    rows = Rows.of(TEXT[:3], None, None)
    hidden = torch.randn(3, TEXT.shape[1], 8).to(torch.bfloat16)
    assert kept.get(rows, hidden) is None
    kept.put(rows, hidden, 1)
    assert torch.equal(kept.get(rows, hidden), hidden)


def test_what_cannot_be_reused_is_said(llama, tiny_folder):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises(ConfigError, match="needs a PeftModel over the LLaMA layout"):
        enable_prefix_reuse(base)
    with pytest.raises(ConfigError, match="this is a Linear"):
        enable_prefix_reuse(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"layer 0 has an adapter.*layers_to_transform"):
        enable_prefix_reuse(llama(layers=(0, 1)))
    with pytest.raises(ConfigError, match="choose from batch, epoch"):
        enable_prefix_reuse(llama(), "run")
    with pytest.raises(ConfigError, match="attention_dropout"):
        enable_prefix_reuse(llama(attention_dropout=0.1))
    model = llama()
    model.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="the embedding is trained"):
        enable_prefix_reuse(model)
    model = llama()
    enable_prefix_reuse(model)
    with pytest.raises(ConfigError, match="already"):
        enable_prefix_reuse(model)


def test_a_frozen_layer_with_dropout_is_refused(llama):
    model = llama(layers=(0, 1), dropout=0.5)
    for name, each in model.named_parameters():
        if "layers.0." in name:
            each.requires_grad_(False)
    with pytest.raises(ConfigError, match="a frozen layer has dropout"):
        enable_prefix_reuse(model)


def test_it_leaves_the_model_as_it_was(llama):
    model = llama()
    layer = model.get_base_model().model.layers[0]
    real = layer.forward
    layer.forward = wrapped = lambda *args, **kwargs: real(*args, **kwargs)  # as Accelerate's hooks do
    reuse = enable_prefix_reuse(model)
    model.config.output_hidden_states = True  # in the config, and not in the call
    model(input_ids=TEXT[:2], labels=TEXT[:2])
    assert reuse.rows_computed == 0
    reuse.disable()
    assert layer.forward is wrapped


def test_noise_in_the_embedding_is_refused_where_it_is_met(llama, tmp_path):
    model = llama()
    enable_prefix_reuse(model)
    with pytest.raises(ConfigError, match="neftune_noise_alpha"):
        _trained(model, tmp_path, neftune_noise_alpha=5.0)
