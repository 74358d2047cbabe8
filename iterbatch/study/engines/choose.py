"""Which engine trains a comparison's pairs, from what a command line or a call names."""

from iterbatch.config import ENGINES
from iterbatch.errors import ConfigError, did_you_mean
from iterbatch.language import _
from iterbatch.study.engines.on_ray import OnRay
from iterbatch.study.engines.processes import Processes
from iterbatch.study.live import Show
from iterbatch.study.pairs import Engine, Notify


def choose(
    engine: str,
    workers: int,
    address: str | None,
    notify: Notify = lambda _: None,
    show: Show = lambda _: None,
) -> Engine | None:
    """The engine that is named; None for no workers: then the study is only begun.

    Args:
        engine: One of ``ENGINES``.
        workers: Pairs in training at a time.
        address: Of a Ray cluster; None starts one on this machine.
        notify: Is notified of every pair that ends.
        show: Is shown where the study stands.

    Raises:
        ConfigError: where they do not go together, or Ray is not there or does not answer.
    """
    if engine not in ENGINES:
        raise ConfigError(
            _("unknown engine '{engine}'; choose from {names}{near}").format(
                engine=engine, names=", ".join(ENGINES), near=did_you_mean(engine, ENGINES)
            )
        )
    if engine == "ray":
        if workers < 1:
            raise ConfigError(
                _(
                    "--workers is {workers}, which begins a comparison for `iterbatch worker`; --engine ray "
                    "needs 1 or more"
                ).format(workers=workers)
            )
        return OnRay(workers, address, notify, show)
    if address is not None:
        raise ConfigError(
            _("--address {address} is that of a Ray cluster; add --engine ray").format(address=address)
        )
    return Processes(workers, notify, show) if workers else None
