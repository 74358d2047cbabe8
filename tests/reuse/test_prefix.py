"""Reuse of the frozen prefix: exact against a twin without it, charged as if each arm ran alone."""

import json

import numpy as np
import pytest
import torch
from support.runs import Notes
from support.steps import epochs, make_step
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from iterbatch.bench import prepare
from iterbatch.checks import make_config
from iterbatch.data.batch import IGNORED, Batch, MicroBatch
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.errors import ConfigError
from iterbatch.model.base import load_base
from iterbatch.model.cut import CutModel
from iterbatch.model.lora import adapter_parameters, copy_adapter, reset_adapter
from iterbatch.model.weights import load_model
from iterbatch.records.record import BatchRecord, EvalRecord, read_records
from iterbatch.reuse.prefetch import Prefetch
from iterbatch.reuse.prefix import PrefixSource, _clock
from iterbatch.reuse.run_stores import weights_digest
from iterbatch.reuse.store import DTYPES, ActivationStore, Layout
from iterbatch.study.run import run as run_bench
from iterbatch.training.step import Extras

LENGTH, LR = 24, 0.01


def _folder(kind, tokenizer, path):
    """A model of three layers with random weights, in hub format.

    Qwen2 with a sliding window on its upper layers.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    extra = {
        "mistral": {"head_dim": 16, "sliding_window": 8},
        "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "qwen3": {"head_dim": 16},
    }.get(kind, {})
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
        **extra,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def _blocks(count=10):
    return np.random.default_rng(0).integers(3, 4000, (count, LENGTH))


def _model(name, **flags):
    config = make_config(model_name=name, dtype="float32", max_length=LENGTH, **flags)
    model = load_model(load_base(config), config.model)
    reset_adapter(model, seed=1)
    for parameter_name, parameter in adapter_parameters(
        model
    ).items():  # as if trained for a while: a new adapter's A has no gradient
        if "lora_B" in parameter_name:
            torch.manual_seed(len(parameter_name))
            parameter.data.normal_(std=0.05)
    return model.train()


def _step(model, source=None, reuse=True, batches=1000, extras=None):
    return make_step(model, epochs(batches), lr=LR, reuse=reuse, source=source, extras=extras)


def _store(model, folder, blocks, dtype="float32", limit=float("inf")):
    cut = CutModel(model)
    store = ActivationStore(
        folder, {"key": cut.cut}, Layout([LENGTH] * len(blocks), 32, dtype, limit), pytest.fail
    )
    return PrefixSource(cut, torch.device("cpu"), store, DTYPES[dtype]), store


def _train(step, stream, batches, repeats=2):
    """Losses of all passes, and after each the gradients' effect: the adapter."""
    losses = []
    for _ in range(batches):
        losses.append(step(next(stream)))
        losses += [step.again() for _ in range(repeats - 1)]
    return losses, copy_adapter(step.passes.model)


def _twin(model, stream, batches, repeats=2):
    """The same passes by the plain model: no cut, no store, no fused loss, no reuse of anything."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step = _step(model)  # for its learning rates only
    losses = []
    for _ in range(batches):
        batch = next(stream)
        for turn in range(repeats):
            optimizer.param_groups[0]["lr"] = step._rate()
            step.ledger.batches += turn == 0
            total = 0.0
            for micro in batch.micro_batches:
                logits = model(input_ids=micro.input_ids, use_cache=False).logits.flatten(0, 1)
                nats = functional.cross_entropy(
                    logits, micro.labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                (nats / batch.label_tokens).backward()
                total += nats.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total / batch.label_tokens)
    return losses, {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("layers", ["all", "top:2", "top:1", "1-1"])
@pytest.mark.parametrize(("accumulate", "checkpointing"), [(1, False), (2, False), (2, True)])
def test_losses_and_adapters_equal_a_twin_without_any_reuse(
    kind, layers, accumulate, checkpointing, tokenizer, tmp_path
):
    """Two epochs with repeats: fresh passes, kept activations, stored ones.

    The twin computes everything each time.
    """
    name, blocks = _folder(kind, tokenizer, tmp_path / "model"), _blocks()
    flags = {"lora_layers": layers, "gradient_checkpointing": checkpointing}

    def stream():
        return BatchStream(Blocks.of(blocks), batch_size=2, grad_accum=accumulate, seed=3)

    batches = 2 * stream().batches_per_epoch
    expected, adapter = _twin(_model(name, **flags), stream(), batches)
    model = _model(name, **flags)
    source, store = _store(model, tmp_path / "store", blocks)
    losses, ours = _train(_step(model, source), stream(), batches)
    stored = store.stored_bytes
    store.close()
    assert stored == store.layout.bytes
    assert losses == pytest.approx(expected, rel=2e-5)
    for (parameter, mine), theirs in zip(ours.items(), adapter.values(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4), parameter


@pytest.fixture
def three(tokenizer, tmp_path):
    return _folder("llama", tokenizer, tmp_path / "three")


def test_gradients_equal_a_twins_to_rounding(three, tmp_path):
    blocks, gradients = _blocks(4), []
    model = _model(three, lora_layers="top:1")
    source, store = _store(model, tmp_path / "store", blocks)
    cut, micro = source.model, next(BatchStream(Blocks.of(blocks), 4, 1, seed=0)).micro_batches[0]
    for hidden in (
        source.fetch(micro)[0],
        (source.settle(), source.fetch(micro)[0])[1],
    ):  # computed, then served
        cut(hidden, micro).sum().backward()
        gradients.append([p.grad for p in adapter_parameters(model).values()])
        model.zero_grad()
    logits = model(input_ids=micro.input_ids, use_cache=False).logits.flatten(0, 1)
    functional.cross_entropy(logits, micro.labels.flatten(), ignore_index=IGNORED, reduction="sum").backward()
    store.close()
    for first, second, p in zip(*gradients, adapter_parameters(model).values(), strict=True):
        assert torch.equal(first, second)
        assert torch.allclose(first, p.grad, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# ----------------------------------
# What is computed, and what is charged


def _counted(source):
    """Count the rows that go through the frozen layers."""
    rows = []
    real = source.model.prefix
    source.model.prefix = lambda micro: (rows.append(len(micro.input_ids)), real(micro))[1]
    return rows


@pytest.mark.parametrize(("reuse", "rows"), [(True, [2]), (False, [2, 2, 2])])
def test_repeats_start_from_the_kept_activations(three, reuse, rows):
    model = _model(three, lora_layers="top:1")
    source = PrefixSource(CutModel(model), torch.device("cpu"))
    step, computed = _step(model, source, reuse=reuse), _counted(source)
    batch = next(BatchStream(Blocks.of(_blocks()), 2, 1, seed=0))
    step(batch)
    step.again(), step.again()
    assert computed == rows
    flops, ledger = step.prices, step.ledger
    assert step.price_ratio == pytest.approx(flops.price_ratio(batch.shapes) if reuse else 1.0)
    assert ledger.flops_fresh == pytest.approx(flops.fresh(batch.shapes))
    assert ledger.flops_repeat == pytest.approx(2 * (flops.repeat if reuse else flops.fresh)(batch.shapes))
    assert ledger.flops_saved == pytest.approx(2 * flops.prefix.of(batch.shapes) if reuse else 0.0)
    assert (ledger.seconds_saved > 0) is reuse


def test_probe_text_is_computed_once_and_its_scores_cost_the_adapted_part(three):
    model = _model(three, lora_layers="top:1")
    source = PrefixSource(CutModel(model), torch.device("cpu"))
    stream = BatchStream(Blocks.of(_blocks(20)), 4, 1, seed=0, aside=np.arange(0, 20, 5))
    step, computed = _step(model, source, extras=Extras(stream.pieces())), _counted(source)
    assert [piece.rows for piece in stream.pieces()] == [2, 2]
    losses = [step.probe(number) for number in (0, 1, 2, 3)]
    assert losses[:2] == losses[2:]  # numbers go round the pieces
    assert computed == [2, 2]
    flops, shapes = step.prices, stream.pieces()[0].shapes
    adapted = flops.forward(shapes) - flops.prefix.of(shapes)
    assert step.ledger.flops_probe == pytest.approx(2 * flops.forward(shapes) + 2 * adapted)
    assert step.ledger.flops == step.ledger.flops_probe
    step.begin()
    batch = next(stream)
    first = step(batch)
    assert step.probe_price == pytest.approx(adapted / flops.fresh(batch.shapes))
    second = step.probe(0)
    assert second != losses[0]  # the adapter as it is now
    # What was answered before a checkpoint is answered again, and its prefix is not paid for again.
    twin = _step(model, source, extras=Extras(stream.pieces()))
    twin.load_state_dict(step.state_dict())
    paid = twin.ledger.flops_probe
    assert (twin(batch), twin.probe(0)) == (first, second)
    assert twin.ledger.flops_probe == paid
    twin.probe(1)
    assert twin.ledger.flops_probe - paid == pytest.approx(adapted)


def test_a_limited_store_serves_some_rows_of_a_batch_and_the_others_are_computed(three, tmp_path):
    model, blocks = _model(three, lora_layers="top:1"), _blocks(10)
    source, store = _store(model, tmp_path / "store", blocks, limit=6 * LENGTH * 32 * 4)
    stream = BatchStream(Blocks.of(blocks), 2, 2, seed=0)
    step, computed = _step(model, source), _counted(source)
    for _ in range(stream.batches_per_epoch):
        step(next(stream))
    first = step.ledger.flops
    assert sum(computed) == 10
    for _ in range(stream.batches_per_epoch):
        step(next(stream))
    store.close()
    flops = step.prices
    assert sum(computed) == 10 + 4
    assert first == pytest.approx(flops.fresh([(10, LENGTH)]))
    assert step.ledger.flops - first == pytest.approx(
        flops.repeat([(10, LENGTH)]) + flops.prefix.of([(4, LENGTH)])
    )
    assert step.ledger.flops_saved == pytest.approx(flops.prefix.of([(6, LENGTH)]))


def test_each_arm_pays_as_if_it_ran_alone(three, tmp_path):
    """The second arm computes no prefix, and is charged for all: FLOPs, and the seconds of the first arm."""
    blocks, ledgers, results, computed = _blocks(10), [], [], []
    for _ in range(2):
        model = _model(three, lora_layers="top:1")
        source, store = _store(model, tmp_path / "store", blocks)
        step = _step(model, source)
        computed.append(_counted(source))
        results.append(_train(step, BatchStream(Blocks.of(blocks), 2, 1, seed=0), 10))
        ledgers.append(step.ledger)
        recorded = sum(store._index["seconds"])
        store.close()
    first, second = ledgers
    assert [sum(rows) for rows in computed] == [10, 0]
    assert second.flops == first.flops
    assert second.flops_saved == first.flops_saved
    assert (first.seconds_charged, second.seconds_charged) == (0.0, pytest.approx(recorded))
    assert second.train_seconds == pytest.approx(second.seconds_charged)  # no clock runs here but the charge
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_a_bf16_store_gives_an_arm_the_same_results_whoever_filled_it(three, tmp_path):
    """A float32 model: what is computed is rounded as what is read will be."""
    blocks, results = _blocks(10), []
    for _ in range(2):
        model = _model(three, lora_layers="top:1")
        source, store = _store(model, tmp_path / "store", blocks, dtype="bfloat16")
        results.append(_train(_step(model, source), BatchStream(Blocks.of(blocks), 2, 1, seed=0), 10))
        store.close()
    exact, _ = _train(
        _step(_model(three, lora_layers="top:1")), BatchStream(Blocks.of(blocks), 2, 1, seed=0), 10
    )
    assert results[0][0] == results[1][0] != exact
    assert results[0][0] == pytest.approx(exact, rel=0.01)


# ----------------------------------------------------------------------------------------------------
# ----------------------------------
# The pass


def test_packed_blocks_attend_without_a_mask_and_backward_ends_at_the_lowest_adapter(three, monkeypatch):
    calls, real = [], functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **o: (calls.append((o.get("attn_mask"), o["is_causal"])), real(q, k, v, **o))[1],
    )
    model = _model(three, lora_layers="top:1")
    cut, micro = CutModel(model), next(BatchStream(Blocks.of(_blocks()), 2, 1, seed=0)).micro_batches[0]
    calls.clear()  # of the token that is written when a model is loaded
    hidden = cut.prefix(micro)
    nats = cut(hidden, micro).sum()
    assert calls == [(None, True)] * 3
    assert not hidden.requires_grad
    nats.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_the_deciding_loss_is_the_only_thing_read_off_the_device_in_a_pass(three, monkeypatch):
    model = _model(three, lora_layers="top:1")
    step, stream = _step(model), BatchStream(Blocks.of(_blocks()), 2, 2, seed=0)
    step(next(stream))
    batch, reads = next(stream).to(torch.device("cpu")), []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _name=name, _real=real: (reads.append(_name), _real(self, *a))[1],
        )
    step(batch)
    assert reads == ["tolist"]
    step.again()
    assert reads == ["tolist"] * 2


def test_prefetch_hands_out_the_streams_batches_and_reads_what_is_stored(three, tmp_path):
    model, blocks = _model(three, lora_layers="top:1"), _blocks(6)
    source, store = _store(model, tmp_path / "store", blocks)
    plain = BatchStream(Blocks.of(blocks), 2, 1, seed=0)
    for threaded in (False, True):
        prefetch = Prefetch(BatchStream(Blocks.of(blocks), 2, 1, seed=0), source)
        if threaded:  # as on a GPU
            from concurrent.futures import ThreadPoolExecutor

            prefetch._pool = ThreadPoolExecutor(1)
        plain.load_state_dict({"cursor": 0})
        for index in range(6):
            ours, theirs = next(prefetch), next(plain)
            assert prefetch.state_dict() == {"cursor": index + 1} == plain.state_dict()
            for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                assert torch.equal(mine.input_ids, other.input_ids)
                assert mine.blocks == other.blocks
                before, _ = source.fetch(other)
                source.settle()
                after, receipt = source.fetch(
                    mine
                )  # read ahead before it was stored, perhaps: it is looked for again
                assert (receipt.served, receipt.computed) == (2, 0)
                assert torch.equal(before, after)
        prefetch.close()
    store.close()


def test_weights_digest_sees_frozen_weights_and_the_architecture_and_no_adapter(three):
    digests = []
    for layers, change in (
        ("top:1", None),
        ("top:1", "adapter"),
        ("top:1", "frozen"),
        ("top:2", None),
        ("top:1", "top"),
    ):
        model = _model(three, lora_layers=layers)
        layer = {"frozen": 0, "top": 2}.get(change)
        if change == "adapter":
            next(iter(adapter_parameters(model).values())).data += 1
        if layer is not None:
            model.get_base_model().model.layers[layer].input_layernorm.weight.data[3] += 0.01
        digests.append(weights_digest(CutModel(model)))
    assert digests[0] == digests[1] == digests[4]
    assert len(set(digests)) == 3


# ----------------------------------------------------------------------------------------------------
# ----------------------------------
# Whole runs


def _records(run_dir, strategy, seed=0):
    return list(read_records(run_dir / strategy / f"seed{seed}" / "batches.jsonl", BatchRecord))


def _rows(run_dir):
    return {
        (row["strategy"], row["seed"]): row
        for row in json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    }


def _final(run_dir, strategy, split="test"):
    records = read_records(run_dir / strategy / "seed0" / "evals.jsonl", EvalRecord)
    return [record.nats for record in records if record.split == split][-1]


@pytest.fixture
def quick(tiny, tmp_path):
    return tiny | {
        "lora_layers": "top:1",
        "epochs": 2,
        "strategies": ["baseline", "abr"],
        "loss_threshold": 3.0,
        "save_dir": tmp_path,
    }


def test_a_run_is_the_same_with_every_kind_of_reuse_and_cheaper(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    runs = {
        name: run_bench(make_config(**quick, reuse=reuse, reuse_dtype="float32", run_name=name))
        for name, reuse in (("off", "off"), ("batch", "batch"), ("filling", "epoch"), ("filled", "epoch"))
    }
    rows = {name: _rows(run) for name, run in runs.items()}
    for strategy in ("baseline", "abr"):
        reference = [loss for record in _records(runs["off"], strategy) for loss in record.losses]
        for name, run in runs.items():
            assert [loss for record in _records(run, strategy) for loss in record.losses] == pytest.approx(
                reference, rel=1e-4
            ), name
            assert _final(run, strategy) == pytest.approx(_final(runs["off"], strategy), rel=1e-4)
            assert sum(record.flops for record in _records(run, strategy)) == pytest.approx(
                rows[name][strategy, 0]["flops"]
            )
    cost = {name: [rows[name][strategy, 0]["flops"] for strategy in ("baseline", "abr")] for name in runs}
    assert cost["batch"][0] == pytest.approx(cost["off"][0])
    assert cost["filling"][1] < cost["batch"][1] < cost["off"][1]
    assert cost["filling"][0] < cost["batch"][0]
    assert cost["filled"] == cost["filling"]  # charged as if it ran alone
    for strategy in ("baseline", "abr"):
        saved = rows["filling"][strategy, 0]["flops_saved"]
        assert rows["off"][strategy, 0]["flops"] - rows["filling"][strategy, 0]["flops"] == pytest.approx(
            saved
        )
        assert rows["off"][strategy, 0]["flops_saved"] == 0
        assert rows["filled"][strategy, 0]["seconds_charged"] > 0
    assert rows["filling"]["baseline", 0]["seconds_saved"] > 0
    assert rows["filling"]["baseline", 0]["seconds_charged"] == 0
    assert rows["filling"]["abr", 0]["seconds_charged"] > 0
    plan = json.loads((runs["off"] / "manifest.json").read_text(encoding="utf-8"))["plan"]
    blocks = 16 * 32 + sum(text["tokens"] for text in plan["scored"].values())
    assert rows["filled"]["abr", 0]["store_gb"] == pytest.approx(blocks * 32 * 4 / 1e9, rel=0.25)
    assert len(list((tmp_path / "cache" / "activations").iterdir())) == 3
    assert "## Frozen prefix reused" in (runs["filled"] / "summary.md").read_text(encoding="utf-8")
    _, plan = prepare.plan(make_config(**quick, reuse="epoch", dry_run=True))
    assert plan.flops == pytest.approx(cost["filled"][0])


def test_with_matched_flops_the_baseline_does_every_batch_and_nobody_overspends(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    for limit, blocks in (
        (1.0, 14),
        (7 * 32 * 32 * 2 / 1e9, 14),
    ):  # the last batch of an epoch is short; half of the blocks fit
        flags = quick | {
            "match": "flops",
            "max_train_tokens": blocks * 32,
            "epochs": 3,
            "reuse": "epoch",
            "reuse_limit_gb": limit,
        }
        run = run_bench(make_config(**flags, run_name=f"run{limit:g}"))
        baseline, abr = _rows(run)["baseline", 0], _rows(run)["abr", 0]
        planned = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["plan"]["flops"]
        assert baseline["batches"] == 3 * 4
        assert baseline["flops"] == pytest.approx(planned)
        assert abr["flops"] < planned * (1 + 1 / 12)
        assert _records(run, "baseline")[-1].learning_rate < 0.1 * 0.01


def test_lora_on_the_lowest_layer_is_told_that_there_is_nothing_to_reuse(quick):
    listener = Notes()
    run = run_bench(
        make_config(**quick | {"lora_layers": "all", "reuse": "epoch", "run_name": "all"}), listener
    )
    assert sum("no frozen prefix to reuse" in note for note in listener.notes) == 1
    assert _rows(run)["baseline", 0]["store_gb"] == 0


def test_a_limit_below_one_block_is_refused_before_anything_is_made(quick, tmp_path):
    with pytest.raises(ConfigError, match="less than one block"):
        run_bench(make_config(**quick, reuse="epoch", reuse_limit_gb=1e-9, run_name="small"))
    assert not (tmp_path / "small").exists()


def test_a_store_folder_that_cannot_be_made_is_done_without(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path / "cache"))
    run_bench(
        make_config(**quick | {"strategies": ["baseline"], "run_name": "warm"})
    )  # token blocks are in the cache now
    (tmp_path / "cache" / "activations").write_text("in the way", encoding="utf-8")
    listener = Notes()
    epoch = quick | {"reuse": "epoch", "reuse_dtype": "bfloat16"}
    run = run_bench(make_config(**epoch, run_name="run"), listener)
    (tmp_path / "cache" / "activations").unlink()
    stored = run_bench(make_config(**epoch, run_name="stored"))
    numbers = [
        [rows["baseline", 0][name] for name in ("test_ppl", "base_val_ppl")]
        for rows in map(_rows, (run, stored))
    ]
    assert numbers[0] == numbers[1]  # rounded as if there was a store
    assert any("cannot be used" in note and "as with --reuse batch" in note for note in listener.notes)
    assert _rows(run)["baseline", 0]["store_gb"] == 0


def test_an_empty_batch_for_company_is_not_stored(three, tmp_path):
    """Of several processes one may have no row of a short micro-batch: it computes one, and keeps nothing."""
    model, blocks = _model(three, lora_layers="top:1"), _blocks(3)
    source, store = _store(model, tmp_path / "store", blocks)
    micro = next(BatchStream(Blocks.of(blocks), 2, 1, seed=0, rank=1, world=2)).micro_batches[0]
    lone = next(BatchStream(Blocks.of(blocks[:1]), 2, 1, seed=0, rank=1, world=2)).micro_batches[0]
    assert (len(micro.blocks), lone.blocks, lone.rows_in_all) == (1, (), 1)
    hidden, receipt = source.fetch(lone)
    source.settle()
    assert hidden.shape == (1, LENGTH, 32)
    assert (receipt.computed, receipt.served, store.stored_bytes) == (0, 0, 0)
    store.close()


def test_a_batch_of_any_shape_trains_without_a_store(three):
    model = _model(three, lora_layers="top:1")
    ids = torch.randint(3, 4000, (2, 7))
    step = _step(model)
    assert step(Batch((MicroBatch(ids, ids),))) > 0
    assert step.ledger.flops == pytest.approx(step.prices.fresh([(2, 7)]))


class BusyEvent:
    """Of a GPU that is still at work: it can be asked for a time only once it has been waited for."""

    made = 0

    def __init__(self, **_):
        type(self).made += 1
        self.at, self.over = float(type(self).made), False

    def record(self):
        """Queued."""

    def synchronize(self):
        """Waited for."""
        self.over = True

    def elapsed_time(self, end):
        """As torch does it: an error while the device has not come to the end."""
        if not end.over:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1e3 * (end.at - self.at)


def test_seconds_of_a_prefix_wait_for_a_gpu_that_is_still_at_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", BusyEvent)
    with _clock(torch.device("cuda")) as seconds:
        pass
    assert seconds() == 1.0
