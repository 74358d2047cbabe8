"""What a run was made on: versions, hardware, and the memory of this process."""

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from iterbatch.language import _


def environment() -> dict[str, Any]:
    """Versions, hardware and the git commit, for the manifest. No host name, user name or path."""
    import torch

    packages = ("iterbatch", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    versions = {name: metadata.version(name) for name in packages if _installed(name)}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or "unknown")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git_commit() -> str | None:
    """IterBatch's own, where it runs from its repository; not that of a project it is installed in."""
    package = Path(__file__).resolve().parents[1]
    try:
        if Path(_git(package, "rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def busy() -> str | None:
    """A word on other work on this machine, where the system counts it and there is as much as cores."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < cores:
        return None
    return _(
        "the machine is busy (load {load:.1f} on {cores} cores): training takes longer, and its "
        "seconds say little"
    ).format(load=load, cores=cores)


_PROC_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Start a new peak for :func:`peak_memory_mb`, where the system can.

    Elsewhere it is the process's so far.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> float:
    """Peak memory in MB: of the accelerator where there is one, else resident in this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if _PROC_STATUS.exists():
        line = next(
            line for line in _PROC_STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024 / 1e6
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e6  # pyright: ignore[reportAttributeAccessIssue]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
