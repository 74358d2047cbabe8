"""The processes of a run, through Accelerate: one, or several that share each batch."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from iterbatch.errors import ConfigError
from iterbatch.language import _

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


# A process may wait that long for the main one, which writes samples and the report alone. One that is
# gone is noticed in seconds: :mod:`iterbatch.runtime.peers`.
TIMEOUT = timedelta(hours=2)


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate with the precision of this run, whatever an earlier run of this process had.

    Args:
        precision: ``no``, ``bf16`` or ``fp16``.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Precision is global to a process in Accelerate; runs of one process may differ.
    AcceleratorState._reset_state()
    _state()  # with what it says of timeouts and devices
    return Accelerator(mixed_precision=precision, cpu=_on_cpu())


def _state() -> PartialState:
    """Accelerate's view of the processes, whichever of it and the Accelerator is asked for first."""
    from accelerate import PartialState

    if not _several():
        return PartialState(cpu=_on_cpu())
    _check_launch()
    state = PartialState(cpu=_on_cpu(), timeout=TIMEOUT)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return state


def _leave() -> None:
    """End the group while the interpreter lives: gloo's threads may hold tensors, and abort without it.

    Source: pytorch/pytorch#179291.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _check_launch() -> None:
    """See that processes were started in a way that can be trained with.

    Raises:
        ConfigError: with more processes than GPUs on this machine, of which torch would say "invalid
            ordinal"; and where Accelerate is to shard the model its own way.
    """
    import torch

    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                _(
                    "accelerate launch is set up for {name}; leave that out of it, and give --sharding fsdp "
                    "where the model is too large for one GPU"
                ).format(name=name)
            )
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1), torch.cuda.device_count()
    if not _on_cpu() and 0 < gpus < processes:
        raise ConfigError(
            _(
                "{processes} processes on a machine with {gpus} GPU(s); give --nproc_per_node {gpus}, or set "
                "ACCELERATE_USE_CPU=true to train without them"
            ).format(processes=processes, gpus=gpus)
        )


def _on_cpu() -> bool:
    """Whether several processes share a machine without an accelerator: Accelerate wants to be told so."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_CPU") or (_several() and not torch.accelerator.is_available())


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return _state().is_main_process


def from_main(value: Any) -> Any:
    """The main process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    return value if _state().num_processes == 1 else broadcast_object_list([value])[0]


def count() -> int:
    """How many processes there are."""
    return _state().num_processes


def rank() -> int:
    """Which of them this is, from 0."""
    return _state().process_index


def gathered(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    from accelerate.utils import gather_object

    return [value] if count() == 1 else gather_object([value])


def agreed(value: bool) -> bool:
    """Whether it is so in every process."""
    return all(gathered(value))
