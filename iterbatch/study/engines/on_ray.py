"""Pairs over the machines of a Ray cluster: gives them to workers, and takes back what has come of them.

A worker keeps the model and text of one cell loaded. The pair of one that is lost is trained by another, from
its checkpoint where that can still be seen. The folder of the study is the truth, as for all engines.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from iterbatch.errors import RunError, first_line
from iterbatch.language import _, in_use
from iterbatch.records import layout
from iterbatch.records.course import Running
from iterbatch.records.origin import read_places
from iterbatch.records.read import read_study
from iterbatch.records.write import write_text
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.strategy.own import SOURCES
from iterbatch.study.engines.claims import (
    TRIES,
    WAIT,
    Claim,
    claimed,
    fail_with_source,
    forget,
    holding,
    is_held,
)
from iterbatch.study.engines.cluster import Share, connected, need_answer, need_ray, share
from iterbatch.study.engines.parcel import Parcel, add_missing, pack, pack_cell, pack_records, unpack
from iterbatch.study.engines.ray_worker import BROKEN, HELD, MARK, STOPPED, Answer, Orders, RayWorker
from iterbatch.study.engines.worker import GRACE, TOLD_EVERY
from iterbatch.study.live import Live, Show
from iterbatch.study.pairs import Notify, Pair
from iterbatch.study.study_folder import versions

AGAIN = 5.0  # seconds until a pair that another process holds is looked at again
CALLS = 3  # of a worker at a time: training, where it is, and to stop


class OnRay:
    """Trains pairs on the workers of a Ray cluster.

    A pair that crashes or diverges is infinity, the others are trained.

    Args:
        workers: Pairs in training at a time.
        address: Of the cluster; None starts one on this machine.
        notify: Is notified of every pair that ends.
        show: Is shown where the study stands.

    Raises:
        ConfigError: where Ray is not installed, or the cluster does not answer.
    """

    def __init__(
        self,
        workers: int,
        address: str | None = None,
        notify: Notify = lambda _: None,
        show: Show = lambda _: None,
    ) -> None:
        need_ray()
        if address is not None:
            need_answer(address)
        self.workers, self.address, self.notify, self.show = workers, address, notify, show

    def train(self, pairs: Sequence[Pair]) -> None:
        """Train those that have not ended; those that failed before are tried again.

        Raises:
            RunError: where the workers cannot even begin, or are lost again and again.
            Stopped: where it was asked to stop.
        """
        for pair in pairs:
            (pair.folder / layout.FAILED).unlink(missing_ok=True)
            if not is_held(pair):
                forget(pair)
        left = [pair for pair in pairs if not pair.ended]
        self.notify(
            _("{count} pairs of arm and seed, {before}, {workers} at a time").format(
                count=len(pairs),
                before=_("{count} finished before").format(count=len(pairs) - len(left)),
                workers=self.workers,
            )
        )
        if not left:
            return
        with connected(self.address, self.workers) as ray, Interrupts() as interrupts:
            mark = secrets.token_hex(16)
            marked = pairs[0].run_dir / layout.WORKERS / MARK
            write_text(marked, mark)
            each, threads = share(ray, self.address, self.workers)
            orders = partial(_orders, pairs[0].run_dir.resolve(), mark, threads)
            crew = Crew(ray, self.workers, each, orders)
            try:
                Foreman(pairs, crew, interrupts, self.notify, self.show).run()
            finally:
                crew.end()
                marked.unlink(missing_ok=True)


def _orders(run_dir: Path, mark: str, threads: int, cell: str) -> Orders:
    """What the workers of a cell are told; text and models by where they are on this machine."""
    content = read_study(run_dir)
    for name, kept in content["cells"].items():
        kept["config"] |= read_places(run_dir / name)
    arms = content["cells"][cell]["arms"].items()
    names = {dict(own or {}).get("strategy", name) for name, own in arms}
    own = tuple((SOURCES[name].words, SOURCES[name].file.read_bytes()) for name in sorted(names & {*SOURCES}))
    return Orders(json.dumps(content), cell, str(run_dir), mark, threads, own, in_use())


# ------------------------------------------------------------------------------------------------------------
# The workers


@dataclass
class Member:
    """A worker, and what it is doing."""

    actor: Any
    cell: str
    call: Any  # the future of what it was asked last: to begin, or to train
    pair: Pair | None = None
    host: str = ""
    begun: bool = False
    shares: bool = True  # it sees the study's folder
    running: Running | None = None
    asked: Any = None  # the future of where its pair is
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # where it cannot hold it itself

    @property
    def idle(self) -> bool:
        """Whether it may be given a pair."""
        return self.begun and self.pair is None

    def where(self, fraction: float, loss: float | None, doing: str) -> Running | None:
        """How far its pair is, as it has said."""
        return self.pair and Running(self.pair.name, self.pair.folder, fraction, loss, doing)


class Crew:
    """The workers that there are.

    Args:
        ray: Connected.
        size: As many at a time.
        each: What each is given.
        orders: Of a cell's workers.
    """

    def __init__(self, ray: Any, size: int, each: Share, orders: Any) -> None:
        self.ray, self.size, self._orders = ray, size, orders
        options = {"num_cpus": each.cores, "num_gpus": each.gpus, "max_concurrency": CALLS}
        self._kind = ray.remote(RayWorker).options(**options, max_restarts=0, max_task_retries=0)
        self.members: list[Member] = []

    @property
    def training(self) -> list[Member]:
        """Those that have a pair."""
        return [member for member in self.members if member.pair is not None]

    def start(self, cell: str) -> None:
        """Start one for a cell; it is there when it has answered."""
        actor = self._kind.remote(self._orders(cell))
        self.members.append(Member(actor, cell, actor.begin.remote()))

    def answers(self, seconds: float) -> Iterator[tuple[Member, Answer | Exception]]:
        """What workers have answered within a time; an exception where one is lost."""
        calls = {
            member.call: member for member in self.members if member.pair is not None or not member.begun
        }
        if not calls:
            time.sleep(seconds)
            return
        done, _left = self.ray.wait([*calls], num_returns=1, timeout=seconds)
        more, _left = self.ray.wait([*calls], num_returns=len(calls), timeout=0)
        for call in dict.fromkeys([*done, *more]):
            try:
                yield calls[call], self.ray.get(call)
            except self.ray.exceptions.RayError as problem:
                yield calls[call], problem

    def look(self) -> None:
        """Ask those that train where they are, and note what they have said."""
        for member in self.training:
            if member.asked is not None and self.ray.wait([member.asked], timeout=0)[0]:
                with contextlib.suppress(self.ray.exceptions.RayError):
                    member.running = member.where(*self.ray.get(member.asked))
                member.asked = None
            if member.asked is None:
                member.asked = member.actor.where.remote()

    def dismiss(self, member: Member) -> None:
        """End one."""
        member.held.close()
        with contextlib.suppress(self.ray.exceptions.RayError, ValueError):
            self.ray.kill(member.actor)
        self.members.remove(member)

    def end(self) -> None:
        """End all; copies of the study on other machines are deleted."""
        clear = [each.actor.clear.remote() for each in self.members if each.idle and not each.shares]
        if clear:
            self.ray.wait(clear, num_returns=len(clear), timeout=GRACE)
        for member in list(self.members):
            self.dismiss(member)


# ------------------------------------------------------------------------------------------------------------
# Who does what


class Foreman:
    """Gives pairs to workers until all have ended.

    Args:
        pairs: Of one study.
        crew: Its workers.
        interrupts: Say whether it was asked to stop.
        notify: Is notified of every pair that ends, and of workers that are lost.
        show: Is shown where the study stands.
    """

    def __init__(
        self, pairs: Sequence[Pair], crew: Crew, interrupts: Interrupts, notify: Notify, show: Show
    ) -> None:
        self.pairs, self.crew, self.interrupts, self.notify = pairs, crew, interrupts, notify
        self.live = Live(pairs, notify, show)
        self._tries: dict[str, int] = {}  # of pairs whose worker was lost
        self._false_starts = 0  # workers in a row that were lost before they began
        self._elsewhere: dict[
            str, float
        ] = {}  # pairs that other processes hold, and until when to believe it
        self._known = {pair.name for pair in pairs if pair.ended}
        self._looked = 0.0

    def run(self) -> None:
        """Until every pair has ended or the study is asked to stop.

        Raises:
            RunError: where workers cannot begin.
            Stopped: where it was asked to stop; pairs in training have made their checkpoints.
        """
        try:
            while (left := [pair for pair in self.pairs if not pair.ended]) or self.crew.training:
                if self.interrupts.requested is not None:
                    self._stop(self.interrupts.requested)
                self._give(left)
                for member, answer in self.crew.answers(WAIT):
                    self._take(member, answer)
                self._tell()
            self._tell()
            self.interrupts.check()
        except BaseException:
            self.live.stopped()
            raise

    def _give(self, left: Sequence[Pair]) -> None:
        """Give what can be trained to workers that are free, and see that there are as many as are needed."""
        ready = [pair for pair in left if self._ready(pair)]
        members = self.crew.members
        for member in [each for each in members if each.idle]:
            pair = next((each for each in ready if each.cell.name == member.cell), None)
            if pair is not None:
                ready.remove(pair)
                self._train(member, pair)
            elif not any(each.cell.name == member.cell for each in self._open(left)):
                self.crew.dismiss(member)
        for pair in ready:
            coming = [each for each in members if each.cell == pair.cell.name and not each.begun]
            wanted = [each for each in ready if each.cell.name == pair.cell.name]
            if len(members) < self.crew.size and len(coming) < len(wanted):
                self.crew.start(pair.cell.name)

    def _open(self, left: Sequence[Pair]) -> list[Pair]:
        """Those that nobody trains here."""
        here = {member.pair.name for member in self.crew.training if member.pair is not None}
        return [pair for pair in left if pair.name not in here]

    def _ready(self, pair: Pair) -> bool:
        """Whether a pair can be trained now."""
        if not self._open([pair]) or self._elsewhere.get(pair.name, 0.0) > time.monotonic():
            return False
        source = pair.waits_for(self.pairs)
        if source is not None and not source.ended:
            return False
        if is_held(pair):
            self._elsewhere[pair.name] = time.monotonic() + AGAIN
            return False
        if source is not None and source.broken:
            fail_with_source(pair, source)
            return False
        return True

    def _train(self, member: Member, pair: Pair) -> None:
        forget(pair)  # of a process that ended elsewhere
        sent: dict[str, Parcel] = {}
        if not member.shares:
            member.held = contextlib.ExitStack()
            if not member.held.enter_context(holding(pair)):
                return
            member.held.enter_context(claimed(pair, Claim.of_this_process()))
            sent = _needed(pair, self.pairs)
        member.pair, member.running, member.asked = pair, Running(pair.name, pair.folder), None
        member.call = member.actor.train.remote(pair.name, sent)

    def _take(self, member: Member, answer: Answer | Exception) -> None:
        """What a worker has answered: that it is there, or how its pair went."""
        if isinstance(answer, Exception):
            self._lost(member, answer)
        elif not member.begun:
            self._begun(member, answer)
        else:
            self._trained(member, answer)

    def _begun(self, member: Member, answer: Answer) -> None:
        if answer["versions"] != (ours := versions()):
            raise RunError(
                _(
                    "a worker on {host!r} has {theirs}, and this machine {ours}; install the same on both"
                ).format(host=answer["host"], theirs=_listed(answer["versions"]), ours=_listed(ours))
            )
        member.begun, member.host, member.shares = True, answer["host"], answer["shares"]
        self._false_starts = 0

    def _trained(self, member: Member, answer: Answer) -> None:
        pair, member.pair = member.pair, None
        assert pair is not None
        try:
            if answer["how"] == HELD:
                self._elsewhere[pair.name] = time.monotonic() + AGAIN
            elif answer["how"] == BROKEN:
                raise RunError(_("a worker could not begin:\n{last}").format(last=answer["why"]))
            elif not member.shares:
                _bring_back(pair, answer, member.host)
            if answer["how"] == STOPPED:
                self.crew.dismiss(member)
        finally:
            member.held.close()

    def _lost(self, member: Member, problem: Exception) -> None:
        """A worker has died, or its machine has, or it cannot be reached any more."""
        pair, why = member.pair, _reason(problem)
        self.crew.dismiss(member)
        if pair is None:
            self._false_starts += 1
            if self._false_starts >= TRIES:
                raise RunError(_("a worker could not begin:\n{last}").format(last=why))
            return
        forget(pair)
        tries = self._tries[pair.name] = self._tries.get(pair.name, 0) + 1
        if pair.ended:
            return
        if tries >= TRIES:
            pair.fail(
                _("its worker was lost while it was trained, the last of {tries} tries: {why}").format(
                    tries=tries, why=why
                )
            )
        else:
            self.notify(
                _("{name}: its worker on {host!r} was lost ({why}); resumed, try {number} of {tries}").format(
                    name=pair.name, host=member.host, why=why, number=tries + 1, tries=TRIES
                )
            )

    def _tell(self) -> None:
        """Notify of pairs that have ended, and show where the others are."""
        for pair in self.pairs:
            if pair.name not in self._known and pair.ended:
                self._known.add(pair.name)
                self.notify(f"[{len(self._known)}/{len(self.pairs)}] {pair.name}: {pair.outcome}")
        if time.monotonic() - self._looked >= TOLD_EVERY:
            self._looked = time.monotonic()
            self.crew.look()
            self.live.update([each.running for each in self.crew.training if each.running is not None])

    def _stop(self, signum: int) -> None:
        """Ask all workers to make a checkpoint and stop; wait for them.

        Raises:
            Stopped: always.
        """
        until = time.monotonic() + GRACE
        for member in self.crew.members:
            member.actor.stop.remote(signum)
        while self.crew.training and time.monotonic() < until:
            for member, answer in self.crew.answers(WAIT):
                if member.pair is not None and not isinstance(answer, Exception):
                    self._trained(member, answer)
                else:
                    self.crew.dismiss(member)
        raise Stopped(signum)


def _needed(pair: Pair, pairs: Sequence[Pair]) -> dict[str, Parcel]:
    """What a worker needs of the study's folder that does not see it, by folder."""
    cell = pair.run_dir / pair.cell.name
    sent = {pair.cell.name: pack_cell(cell)}
    if (pair.folder / layout.BATCHES).exists():  # it has been trained before
        sent[_place(pair)] = pack(pair.folder)
    if (source := pair.waits_for(pairs)) is not None:
        sent[_place(source)] = pack_records(source.folder)
    return sent


def _place(pair: Pair) -> str:
    return pair.folder.relative_to(pair.run_dir).as_posix()


def _bring_back(pair: Pair, answer: Answer, host: str) -> None:
    """Put what a worker has sent into the study's folder, if it was made from what the others were."""
    cell, manifest = pair.run_dir / pair.cell.name, answer["cell"].get(layout.MANIFEST)
    ours = cell / layout.MANIFEST
    if manifest is not None and ours.exists():
        origins = [json.loads(each).get("origin") for each in (manifest, ours.read_bytes())]
        if origins[0] != origins[1]:
            pair.fail(
                _(
                    "text or model on {host!r} is not what the pairs before it were made from, under the "
                    "same name"
                ).format(host=host)
            )
            return
    add_missing(answer["cell"], cell)
    if answer["pair"]:
        unpack(answer["pair"], pair.folder)


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _reason(problem: Exception) -> str:
    """What Ray says of a worker that is lost, in a line: where its code raised, what that was."""
    said = str(problem).strip().splitlines()
    if not said:
        return first_line(problem)
    raised = "creation task" in said[0] or "Traceback" in str(problem)
    return (said[-1] if raised else said[0])[:240]
