"""The processes of a run, through Accelerate: one, or several that share each batch."""

from pathlib import Path
from typing import Any

from iterbatch.config import BenchConfig


def make_accelerator(precision: str, config: BenchConfig | None = None, run_dir: Path | None = None) -> Any:
    """Accelerate with the precision of this run, whatever an earlier run of this process had, and with trackers where asked for."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # mixed precision is global to a process in Accelerate; runs of one process may differ
    trackers: Any = [name for name in config.run.log_with if name != "none"] if config and run_dir else []
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_dir=str(run_dir) if run_dir else None)
    if trackers and config is not None:
        flat = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.flat().items()}
        accelerator.init_trackers("tracking", config=flat)
    return accelerator


def _state() -> Any:
    """Accelerate's view of the processes, whichever of it and the Accelerator is asked for first."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


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
