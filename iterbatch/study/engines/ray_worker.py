"""A worker of a Ray cluster: trains pairs of one cell on its machine, over a model and text that stay loaded.

It works in the study's folder where its machine sees it, and else in a copy of its own, which is sent back.
It needs nothing of Ray, and says everything in plain values.
"""

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iterbatch.bench.prepare import prepare
from iterbatch.errors import UserError, first_line
from iterbatch.language import use
from iterbatch.quiet import quiet_libraries
from iterbatch.records import layout
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.strategy import register
from iterbatch.study.engines.claims import Claim, claimed, holding, read_running
from iterbatch.study.engines.in_process import train_cell
from iterbatch.study.engines.parcel import Parcel, add_missing, check_names, pack, pack_cell, unpack
from iterbatch.study.engines.worker import Teller, fail
from iterbatch.study.pairs import Pair, pairs_of
from iterbatch.study.study_folder import from_json, versions

MARK = "ray_mark"  # in the folder of workers: who can read it there sees the study's folder
# How the training of a pair went.
ENDED, STOPPED, HELD, BROKEN = "ended", "stopped", "held", "broken"
Answer = dict[str, Any]


@dataclass(frozen=True)
class Orders:
    """What a worker is told when it begins; plain values, so that it travels as they do."""

    study: str  # JSON
    cell: str
    run_dir: str  # absolute
    mark: str  # what the study's folder says
    threads: int
    own: tuple[tuple[str, bytes], ...]  # strategies of one's own: FILE.py:CLASS, and the file's content
    language: str


class RayWorker:
    """Trains pairs of a cell, one at a time; further calls are answered meanwhile.

    Args:
        orders: What it is told.
    """

    def __init__(self, orders: Orders) -> None:
        use(orders.language)
        quiet_libraries()
        given = Path(orders.run_dir)
        self.shares = _says(given, orders.mark)
        self.run_dir = given if self.shares else _copy(orders.mark)
        self._register(orders.own)
        study = from_json(json.loads(orders.study), self.run_dir)
        self._cell = next(cell for cell in study.cells if cell.name == orders.cell)
        mine = [pair for pair in pairs_of(study, self.run_dir) if pair.cell.name == orders.cell]
        self._pairs = {pair.name: pair for pair in mine}
        self._pair = mine[0]  # the one in training, or to be
        self._interrupts, self._threads = Interrupts(), orders.threads
        teller = Teller(self._pairs, orders.cell)
        self._training = train_cell(
            self._folder, self._coming(), lambda: prepare(self._cell.config), teller, fail, self._interrupts
        )

    @property
    def _folder(self) -> Path:
        return self.run_dir / self._cell.name

    def _register(self, own: tuple[tuple[str, bytes], ...]) -> None:
        """Take over strategies of one's own, from their files or from what was sent."""
        for word, content in own:
            file, name = word.rsplit(":", 1)
            if not self.shares:
                sent = self.run_dir / "own" / Path(file).name
                sent.parent.mkdir(exist_ok=True)
                sent.write_bytes(content)
                file = str(sent)
            register(f"{file}:{name}")

    def _coming(self) -> Iterator[Pair]:
        while True:
            yield self._pair

    def begin(self) -> Answer:
        """Where it is, what it trains with, and whether it sees the study's folder."""
        host = {"host": socket.gethostname(), "pid": os.getpid()}
        return {**host, "versions": versions(), "shares": self.shares}

    def train(self, name: str, sent: Mapping[str, Parcel]) -> Answer:
        """Train a pair to its end, or until it is asked to stop.

        Args:
            name: Of the pair.
            sent: Where it does not see the study's folder: what it needs of that, by folder.

        Returns:
            How it went, and where it does not see the folder, all that has come of it.
        """
        torch.set_num_threads(self._threads)  # of the thread that trains
        self._pair = pair = self._pairs[name]
        try:
            self._take(sent, pair)
            how = self._train(pair)
        except Stopped:
            how = {"how": STOPPED}
        except UserError as problem:
            how = {"how": BROKEN, "why": str(problem)}
        except Exception as problem:  # it must not travel as an object
            how = {"how": BROKEN, "why": f"{type(problem).__name__}: {first_line(problem)}"}
        if self.shares or how["how"] in (HELD, BROKEN):
            return how
        return {**how, "pair": pack(pair.folder), "cell": pack_cell(self._folder)}

    def _train(self, pair: Pair) -> Answer:
        if pair.ended:  # by a worker that was lost before it could say so
            return {"how": ENDED}
        with holding(pair) as free:
            if not free:
                return {"how": HELD}
            with claimed(pair, Claim.of_this_process()):
                next(self._training)
        return {"how": ENDED}

    def _take(self, sent: Mapping[str, Parcel], pair: Pair) -> None:
        """Put into its own copy what it lacks; what a worker before it has left there is further on."""
        check_names(place for place in sent if place != self._cell.name)
        for place, parcel in sent.items():
            folder = self.run_dir / place
            if place == self._cell.name:
                add_missing(parcel, folder)
            elif not (folder / layout.BATCHES).exists():
                unpack(parcel, folder)
        if not self.shares:
            (pair.folder / layout.FAILED).unlink(missing_ok=True)

    def where(self) -> tuple[float, float | None, str]:
        """How far its pair is: fraction, loss, and what it does instead of training."""
        running = read_running(self._pair)
        return running.fraction, running.loss, running.doing

    def stop(self, signum: int) -> None:
        """Make a checkpoint and stop, as at a signal."""
        self._interrupts.requested = signum

    def clear(self) -> None:
        """Delete its copy: everything was sent back."""
        if not self.shares:
            shutil.rmtree(self.run_dir, ignore_errors=True)


def _says(run_dir: Path, mark: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return (run_dir / layout.WORKERS / MARK).read_text(encoding="utf-8") == mark
    return False


def _copy(mark: str) -> Path:
    """The folder that the workers of a study share on a machine that does not see the study's own."""
    folder = Path(tempfile.gettempdir()) / f"iterbatch-{mark}"  # nobody can guess the name
    (folder / layout.WORKERS).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder
