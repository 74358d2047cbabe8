"""``iterbatch.run`` and ``iterbatch.compare``: as the commands of these names, from Python and notebooks."""

import contextlib
from pathlib import Path

from rich.console import Console
from typing_extensions import Unpack

from iterbatch.bench.listener import Listener
from iterbatch.checks import make_config
from iterbatch.cli.progress import RichListener, StudyProgress
from iterbatch.config import BenchConfig
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries
from iterbatch.runtime.processes import is_main
from iterbatch.settings import Settings
from iterbatch.study import run as doors
from iterbatch.study.engines.choose import choose
from iterbatch.study.outcome import Outcome
from iterbatch.study.study_file import load_study


def run(
    config: BenchConfig | None = None, /, listener: Listener | None = None, **settings: Unpack[Settings]
) -> Outcome:
    """Train every strategy with every seed, with progress in the terminal or notebook, and report.

    Args:
        config: From :func:`iterbatch.make_config`; or else give its settings here.
        listener: Is notified of how it goes, instead of the progress that is shown; ``iterbatch.Listener()``
            is a silent one.
        settings: As :func:`iterbatch.make_config` takes them.

    Returns:
        What it has left.

    Raises:
        UserError: before any training, where something that was given cannot be used.
        KeyboardInterrupt: where it was asked to stop; ``resume=FOLDER`` goes on.
    """
    if config is not None and settings:
        raise ConfigError(
            _("give a configuration or settings, not both: {names}").format(names=", ".join(settings))
        )
    config = config or make_config(**settings)
    if config.run.dry_run:
        raise ConfigError(_("dry_run is for the command line; leave it out to train"))
    quiet_libraries()
    shown = RichListener(Console(), config) if listener is None and is_main() else None
    with shown or contextlib.nullcontext():
        return Outcome(doors.run(config, shown or listener))


def compare(
    study: str | Path,
    *,
    workers: int = 1,
    save_dir: str | Path = "results",
    overwrite: bool = False,
    engine: str = "processes",
    address: str | None = None,
) -> Outcome:
    """Train every pair of a study file that has no result yet, and report.

    Args:
        study: The file.
        workers: Pairs in training at a time, 1 or more.
        save_dir: Folder of all runs.
        overwrite: Delete an earlier study of this name.
        engine: ``processes`` of this machine, or ``ray``.
        address: Of a Ray cluster, ``HOST:PORT``; None starts one on this machine.

    Raises:
        UserError: where the file or a folder cannot be used.
        KeyboardInterrupt: where it was asked to stop; the same call goes on.
    """
    loaded = load_study(Path(study), [])
    quiet_libraries()
    folder = Path(save_dir) / loaded.name
    with StudyProgress(Console()) as bars:
        trains = choose(engine, workers, address, bars.notify, bars.show)
        if trains is None:
            raise ConfigError(_("workers is {workers}; it must be at least 1").format(workers=workers))
        doors.compare(loaded, folder, trains, overwrite=overwrite)
    return Outcome(folder)
