"""``--sharding fsdp``: every process keeps its share of each decoder layer, by torch's own FSDP2.

What is sharded: the weights of all decoder layers, frozen prefix and adapters included, and with the
adapters the optimizer's averages. What is not: embedding, last norm and LM head, which are frozen, may be
one and the same weight, and are read outside a forward (:mod:`iterbatch.model.head`): half a gigabyte for a
LLaMA of 7B in bfloat16. The rest of the package sees whole tensors: :func:`whole` and
:func:`shard_like` are the two ways between a share and its tensor.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from iterbatch.data.batch import MicroBatch
from iterbatch.model.cut import CutModel


class ShardedCutModel(CutModel):
    """A :class:`iterbatch.model.cut.CutModel` whose layers are sharded; the PEFT model shares them.

    A layer is gathered when it runs, forward and backward, so all processes must make as many forwards, of
    either part: one that has nothing to do runs along on a dummy row (:meth:`wanted_by_any`).

    Args:
        model: A ``PeftModel`` over the LLaMA layer layout, whole, the same in every process.
        device: Of this process; layers go there one at a time.
    """

    sharded = True

    def __init__(self, model: Any, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(model)
        self._device = device
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        frozen, adapted = list(self.frozen.layers), list(self.adapted.layers)
        for layer in (*frozen, *adapted):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.to(device)
        inner = {id(weight) for layer in (*frozen, *adapted) for weight in layer.parameters()}
        outer = {weight for weight in self.parameters() if id(weight) not in inner}
        fully_shard(self, mesh=mesh, reshard_after_forward=True, ignored_params=outer)
        for layer, following in itertools.pairwise(frozen):
            layer.set_modules_to_forward_prefetch([following])  # the prefix runs outside this forward
        self._begin()

    def _begin(self) -> None:
        """One forward on a token: FSDP takes the first module that runs for the root of what it shards."""
        ids = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
        weight = self.head.weight
        hidden = torch.zeros((1, 1, weight.shape[1]), dtype=weight.dtype, device=self._device)
        casts = torch.autocast(self._device.type, weight.dtype, enabled=weight.dtype != torch.float32)
        with torch.no_grad(), casts:
            self(hidden, MicroBatch(ids, ids))

    def forward(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """As of the model that is not sharded; a tensor of its own, since FSDP hooks what is returned."""
        return super().forward(hidden, micro).clone()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """While entered, gradients stay on their process, and are summed with those of the next backward."""
        synced: Any = self  # FSDP2 makes it one of its own modules
        synced.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            synced.set_requires_gradient_sync(True)

    def wanted_by_any(self, wanted: bool) -> bool:
        """Whether any process has need of the forward that comes: then all of them make one."""
        vote = torch.tensor(float(wanted), device=self._device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX)
        return bool(vote)


def whole(value: Any) -> Any:
    """The tensor that a sharded one stands for, in every process, which must all ask; others as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard_like(value: Tensor, sharded: Any) -> Any:
    """The share of a tensor that this process has, sharded as another is; all of it where that is whole."""
    if not hasattr(sharded, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(sharded.device)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


@contextlib.contextmanager
def whole_weights(*modules: nn.Module) -> Iterator[None]:
    """While entered, modules have whole weights, empty at first; their shares are taken over at the end.

    Random numbers are then drawn as one process draws them. Modules that are not sharded are left alone.
    """
    shares: dict[nn.Module, Any] = {
        module: module.weight for module in modules if hasattr(module.weight, "full_tensor")
    }
    for module, share in shares.items():
        empty = torch.empty(share.shape, dtype=share.dtype, device=share.device)
        module._parameters["weight"] = nn.Parameter(empty, requires_grad=share.requires_grad)
    try:
        yield
    finally:
        for module, share in shares.items():
            made: Any = module.weight
            module._parameters["weight"] = share
            with torch.no_grad():
                share.copy_(shard_like(made.detach(), share))
