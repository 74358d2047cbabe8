"""The processes of a run, through Accelerate: one, or several that share each batch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate with the precision of this run, whatever an earlier run of this process had.

    Args:
        precision: ``no``, ``bf16`` or ``fp16``.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Precision is global to a process in Accelerate; runs of one process may differ.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=_on_cpu())


def _state() -> PartialState:
    """Accelerate's view of the processes, whichever of it and the Accelerator is asked for first."""
    from accelerate import PartialState

    return PartialState(cpu=_on_cpu())


def _on_cpu() -> bool:
    """Whether several processes share a machine without an accelerator: Accelerate wants to be told so."""
    import torch
    from accelerate.utils import parse_flag_from_env

    several = int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())


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
