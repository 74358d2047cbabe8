import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from iterbatch.data.batch import IGNORED
from iterbatch.model import head

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 50, 16, 700


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((ROWS, LENGTH, WIDTH), generator=generator)
    weight = torch.randn((VOCABULARY, WIDTH), generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, :7] = labels[:, -1] = IGNORED
    return hidden, weight, labels, torch.rand((ROWS, LENGTH), generator=generator)


def _plain(hidden, weight, labels):
    logits = functional.linear(hidden, weight).float().flatten(0, 1)
    return functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none").view(
        labels.shape
    )


@pytest.mark.parametrize("entries", [1, 64 * VOCABULARY, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_linear_then_cross_entropy(problem, monkeypatch, entries, dtype):
    """In value and gradient, position by position, whatever the chunk.

    A weighted sum asks for each position's own gradient.
    """
    monkeypatch.setitem(head.CHUNK_ENTRIES, "cpu", entries)
    hidden, weight, labels, factors = problem
    results = []
    for function in (head.head_nats, _plain):
        x = hidden.to(dtype).requires_grad_()
        nats = function(x, weight.to(dtype), labels)
        (nats * factors).sum().backward()
        results.append((nats.detach(), x.grad.float()))
    assert results[0][0].dtype == torch.float32
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5 if dtype == torch.float32 else 0.02)
    assert not results[0][0][labels == IGNORED].any()
    assert not results[0][1][labels == IGNORED].any()


def test_without_gradients_only_values(problem):
    hidden, weight, labels, _ = problem
    with torch.no_grad():
        assert torch.allclose(
            head.head_nats(hidden, weight, labels), _plain(hidden, weight, labels), atol=1e-5
        )


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.entries = max(
            [
                self.entries,
                *(
                    t.numel()
                    for t in (result if isinstance(result, tuple | list) else [result])
                    if torch.is_tensor(t)
                ),
            ]
        )
        return result


def test_logits_of_a_whole_batch_are_never_held(monkeypatch):
    """Ten times the tokens, the same largest tensor: one chunk of logits."""
    monkeypatch.setitem(head.CHUNK_ENTRIES, "cpu", 1)
    weight, largest = torch.randn(VOCABULARY, 4), []
    for tokens in (200, 2000):
        hidden = torch.randn(1, tokens, 4, requires_grad=True)
        with Largest() as watch:
            head.head_nats(hidden, weight, torch.zeros((1, tokens), dtype=torch.int64)).sum().backward()
        largest.append(watch.entries)
    assert largest == [head.LEAST_ROWS * VOCABULARY] * 2
