"""A Ray cluster: found or started, asked what it has, and left as it was."""

import contextlib
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.study.engines.processes import threads_to_share

ANSWER = 20.0  # seconds within which a cluster must have answered
REACHED = 5.0  # of them, in which its machine must
STORE = 200_000_000  # bytes of memory for results on their way, of a cluster of this machine's own
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
# Another process asks first: Ray's own threads try for minutes where nobody answers, and end this one.
KNOCK = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"


@dataclass(frozen=True)
class Share:
    """What each worker is given of a cluster."""

    cores: int
    gpus: float

    @classmethod
    def of(cls, cores: Sequence[int], gpus: float, workers: int) -> "Share":
        """An equal one.

        Args:
            cores: Of each machine.
            gpus: Of all.
            workers: As many fit where there is room for them; a GPU is shared where there are fewer.
        """
        fit = (each for each in range(max(cores, default=1), 1, -1) if _fitting(cores, each) >= workers)
        return cls(
            next(fit, 1), 0.0 if not gpus else 1.0 if gpus >= workers else 1 / math.ceil(workers / gpus)
        )


def _fitting(cores: Sequence[int], each: int) -> int:
    return sum(machine // each for machine in cores)


def need_ray() -> None:
    """See that Ray is installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(_('--engine ray needs Ray: pip install "iterbatch[ray]"'))


def need_answer(address: str) -> None:
    """See that a cluster answers, within ``ANSWER`` seconds.

    Raises:
        ConfigError: where it does not.
    """
    problem = _unreached(address) or _unanswered(address)
    if problem is not None and "Unauthenticated" in problem:
        raise ConfigError(
            _(
                "the Ray cluster at --address {address} asks for a token; set RAY_AUTH_MODE=token here, and "
                "where this is another machine bring ~/.ray/auth_token of the one that began it"
            ).format(address=address)
        )
    if problem is not None:
        raise ConfigError(
            _(
                "the Ray cluster at --address {address} cannot be used ({problem}); give HOST:PORT as `ray "
                "start --head` shows it, with the same Ray and Python there, or leave --address out"
            ).format(address=address, problem=problem)
        )


def _unreached(address: str) -> str | None:
    """Why nothing listens at an address; None where something does."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal():
        return _("it is not HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED).close()
    except (OSError, OverflowError) as problem:
        return str(problem)
    return None


def _unanswered(address: str) -> str | None:
    """Why what listens at an address is no cluster that can be used; None where it is one."""
    command, seconds = [sys.executable, "-c", KNOCK, address], ANSWER - REACHED
    asked = subprocess.Popen(
        command, env=os.environ | QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        said = asked.communicate(timeout=seconds)[1]
        why = _("exit code {returncode}").format(returncode=asked.returncode)
    except subprocess.TimeoutExpired:
        asked.kill()
        said, why = asked.communicate()[1], _("no answer within {seconds:.0f} s").format(seconds=seconds)
    last = said.decode("utf-8", "replace").strip().splitlines()[-1:]
    return None if asked.returncode == 0 else ": ".join([why, *last])[:400]


@contextlib.contextmanager
def connected(address: str | None, workers: int) -> Iterator[Any]:
    """Ray, connected to a cluster that is there, or to one of this machine that ends with the block.

    A connection that this process has already is used as it is.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    silent: Any = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=STORE, **silent)
    else:
        ray.init(address, **silent)
    try:
        if in_main:
            signal.signal(signal.SIGTERM, before)  # Ray has set its own
        yield ray
    finally:
        ray.shutdown()


def share(ray: Any, address: str | None, workers: int) -> tuple[Share, int]:
    """What each worker is given, and its threads."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(each.get("GPU", 0.0) for each in found)
    if address is None:
        return Share(1, Share.of([], gpus, workers).gpus), max(1, threads_to_share() // workers)
    each = Share.of([int(machine.get("CPU", 0)) for machine in found], gpus, workers)
    return each, each.cores
