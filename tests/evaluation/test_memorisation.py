"""What an arm has learnt by heart: which blocks were passed most, and how far each group's loss fell."""

import numpy as np
import pytest

from iterbatch.checks import make_config
from iterbatch.data.blocks import Blocks
from iterbatch.data.data_loader import BatchStream
from iterbatch.data.windows import block_text
from iterbatch.evaluation.memorisation import groups, memorised, passes_of_blocks
from iterbatch.evaluation.perplexity import score
from iterbatch.model.base import load_base
from iterbatch.model.cut import CutModel
from iterbatch.model.lora import copy_adapter, reset_adapter
from iterbatch.model.weights import load_model
from iterbatch.records.record import BatchRecord
from iterbatch.reuse.prefix import PrefixSource
from iterbatch.runtime.processes import make_accelerator


def _record(batch, done, revisited=()):
    return BatchRecord(batch, 0, 8.0, [8.0], done, done, 0.1, 1.0, 30, 1.0, 0.1, revisited=list(revisited))


def test_passes_are_counted_where_they_were_made():
    stream = BatchStream(Blocks.of(np.arange(40).reshape(8, 5)), batch_size=2, grad_accum=1, seed=3)
    order = [stream.rows_of(index) for index in range(4)]
    passes = passes_of_blocks([_record(0, 3), _record(1, 1), _record(2, 1, revisited=[0, 1])], stream)
    assert passes[order[0]].tolist() == [4, 4]
    assert passes[order[1]].tolist() == [2, 2]
    assert passes[order[2]].tolist() == [1, 1]
    assert passes[order[3]].tolist() == [0, 0]


def test_groups_are_those_passed_most_and_least_of_the_trained():
    most, least = groups(np.array([0, 1, 5, 2, 1, 3]))
    assert set(most) == {2, 5}
    assert set(least) == {1, 4}
    assert [len(part) for part in groups(np.array([2, 2, 0, 2]))] == [0, 0]  # all got the same
    assert [len(part) for part in groups(np.zeros(4, dtype=int))] == [0, 0]


def test_what_was_repeated_fell_further(tiny):
    config = make_config(**tiny)
    model = load_model(load_base(config), config.model)
    reset_adapter(model, seed=1)
    cut, accelerator = CutModel(model), make_accelerator("no")
    blocks = Blocks.of(np.random.default_rng(0).integers(3, 4000, (8, 33)))
    passes = np.array([9, 9, 9, 9, 1, 1, 1, 1])
    stream, source = BatchStream(blocks, 4, 1, seed=0), PrefixSource(cut, accelerator.device)
    base: dict[int, float] = {}
    before = memorised(cut, model, stream, passes, source, 4, base)
    assert sorted(base) == list(range(8))
    assert before["most"].loss == pytest.approx(before["most"].base_loss)  # nothing trained yet
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(12):  # on the first group alone
        ids = torch.tensor(blocks.ids[:4])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = copy_adapter(model)
    after = memorised(cut, model, stream, passes, source, 4, base)
    text = block_text(blocks, np.arange(4))
    assert after["most"].loss == pytest.approx(score(cut, text, accelerator).nats / text.tokens, rel=1e-5)
    assert after["most"].base_loss == pytest.approx(before["most"].base_loss)
    assert after["most"].loss < after["most"].base_loss - 0.2
    assert after["most"].loss - after["most"].base_loss < after["least"].loss - after["least"].base_loss
    assert (after["most"].passes, after["least"].passes, after["all"].blocks) == (9.0, 1.0, 8)
    assert all(torch.equal(value, trained[name]) for name, value in copy_adapter(model).items())
