"""A comparison: the pairs (arm, seed) of a study, shared out over worker processes.

What lives here: the study's folder, the workers, and what becomes of a pair that fails. What does not: training an arm
(:mod:`iterbatch.bench.train_arm`), scoring (:mod:`iterbatch.report.comparison`) and the report.

A worker claims a pair by a file lock, which ends with its process. What is finished is in the folder, so a study that was stopped goes on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from iterbatch.runtime import run_folder as folder
from iterbatch.config import RunConfig
from iterbatch.errors import RunError, UserError
from iterbatch.runtime.run_folder import CONFIG, RESUMABLE
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.records.record import sweep, write_json, write_text
from iterbatch.study.study_file import Arm, Cell, Study, as_json, from_json

STUDY, FAILED, WORKERS = "study.json", "failed.json", ".workers"
WAIT = 0.5  # seconds between two looks at the folder


@dataclass(frozen=True)
class Pair:
    """One arm with one seed, in its cell."""

    cell: Cell
    arm: Arm
    seed: int
    run_dir: Path  # of the study

    @property
    def folder(self) -> Path:
        """Where its records go."""
        return self.run_dir / self.cell.name / self.arm.name / f"seed{self.seed}"

    @property
    def name(self) -> str:
        """As it is shown."""
        return "/".join(part for part in (self.cell.name, self.arm.name, f"seed{self.seed}") if part)

    @property
    def ended(self) -> bool:
        """Whether it has a result, or has failed."""
        return (self.folder / "result.json").exists() or (self.folder / FAILED).exists()

    def fail(self, reason: str) -> None:
        """Record that it has failed; it scores infinity."""
        write_json(self.folder / FAILED, {"reason": reason[:500]})

    def waits_for(self, pairs: "list[Pair]") -> "Pair | None":
        """The pair of the same seed that must have ended before."""
        by_seconds = self.cell.config.training.match == "seconds" and self.cell.config.training.budget is None
        wanted = self.arm.source or ("baseline" if by_seconds and self.arm.strategy != "baseline" else None)
        return next((pair for pair in pairs if (pair.cell.name, pair.seed, pair.arm.name) == (self.cell.name, self.seed, wanted)), None)


def pairs_of(study: Study, run_dir: Path) -> list[Pair]:
    """All pairs, seed by seed within a cell, so that a study that is cut short has whole pairings."""
    return [Pair(cell, arm, seed, run_dir) for cell in study.cells for seed in cell.config.training.seeds for arm in cell.arms]


# --------------------------------------------------------------------------------------------------------------------------------------
# The worker


def work(run_dir: Path) -> None:
    """Train pairs of a study until none is left that nobody else is training."""
    study = from_json(run_dir / STUDY)
    pairs = pairs_of(study, run_dir)
    for cell in study.cells:
        mine = [pair for pair in pairs if pair.cell.name == cell.name]
        if any(not pair.ended for pair in mine):
            _work_on(cell, mine, run_dir / cell.name)


def _work_on(cell: Cell, pairs: list[Pair], where: Path) -> None:
    from iterbatch.bench.train_arm import ArmRun, Listener
    from iterbatch.bench.run import set_up
    from iterbatch.bench.prepare import prepare

    listener = Listener()
    with contextlib.closing(_claim_in_turn(pairs)) as claims:
        first = next(claims, None)
        if first is None:
            return
        with set_up(prepare(cell.config), where, listener) as shared:
            pair: Pair | None = first
            while pair is not None:
                try:
                    ArmRun(shared, listener, pair.folder).train(pair.arm, pair.seed)
                except Exception as problem:  # whatever it is, the other pairs go on
                    traceback.print_exc()
                    pair.fail(" ".join(str(problem).split()) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}")
                pair = next(claims, None)


def _claim_in_turn(pairs: list[Pair]) -> Generator[Pair]:
    """Pairs one at a time, each held against other workers until the next is asked for."""
    parent = os.getppid()
    while os.getppid() == parent:  # without one nobody records a crash
        waiting = False
        for pair in pairs:
            if pair.ended:
                continue
            source = pair.waits_for(pairs)
            if source is not None and not source.ended:
                waiting = True
                continue
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(FileLock(_claim(pair).with_suffix(".lock"), blocking=False))
                except Timeout:
                    continue
                if pair.ended:
                    continue
                if _claim(pair).exists():  # of a worker that crashed, whose end is still to be recorded
                    waiting = True
                    continue
                if source is not None and broken(source):
                    pair.fail(f"it is made from {source.name}, which failed")
                    continue
                write_json(_claim(pair), {"pid": os.getpid()})
                held.callback(_claim(pair).unlink, missing_ok=True)
                yield pair
                break  # from the first pair again: what it waited for may be there now
        else:
            if not waiting:
                return
            time.sleep(WAIT)


def _claim(pair: Pair) -> Path:
    return pair.run_dir / WORKERS / f"{pair.name.replace('/', '~')}.json"


# --------------------------------------------------------------------------------------------------------------------------------------
# The study and its workers


def compare(
    study: Study, run_dir: Path, workers: int, run: RunConfig, tell: Callable[[str], None] = lambda _: None, *, keep_arms: bool = False
) -> None:
    """Train every pair of a study that has no result yet.

    Args:
        study: Checked.
        run_dir: Its folder; a study of the same settings that is there already is gone on with.
        workers: Processes at a time; the cores are shared out among them.
        run: Says whether an earlier study of this name may be deleted.
        tell: Told about every pair that ends.
        keep_arms: Let arms that are there already and not in this study stay; they are not trained.

    Raises:
        RunError: where the folder cannot be used, or the workers cannot even begin.
        Stopped: where it was asked to stop; pairs in training have made a checkpoint.
    """
    if run_dir.is_symlink() or (run_dir.exists() and not run_dir.is_dir()):
        raise RunError(f"{run_dir} is not a folder; give another --run_name")
    with folder.locked(run_dir):
        _begin(study, run_dir, overwrite=run.overwrite, keep_arms=keep_arms)
        pairs = pairs_of(study, run_dir)
        for pair in pairs:
            (pair.folder / FAILED).unlink(missing_ok=True)  # tried again
            _claim(pair).unlink(missing_ok=True)
        with Interrupts() as interrupts:
            _Workers(pairs, run_dir, workers, interrupts, tell).run()


def _begin(study: Study, run_dir: Path, *, overwrite: bool, keep_arms: bool) -> None:
    """Write the study into its folder, or check that it is the one that is there."""
    file, content = run_dir / STUDY, as_json(study)
    if overwrite and file.exists():
        folder.empty(run_dir)
    if file.exists():
        before = as_json(from_json(file))
        if keep_arms:
            for name, cell in content["cells"].items():
                cell["arms"] = before["cells"].get(name, cell)["arms"] | cell["arms"]
        _check_same(file, before, content)
    elif any(entry.name not in (folder.LOCK, folder.HOLDER) and not entry.name.startswith(".") for entry in run_dir.iterdir()):
        raise RunError(f"{run_dir} exists already and is not a comparison; give another --run_name")
    sweep(run_dir)
    (run_dir / WORKERS).mkdir(exist_ok=True)
    write_json(file, content)
    for cell in study.cells:
        write_text(run_dir / cell.name / CONFIG, cell.config.to_yaml())


def _check_same(file: Path, then: dict, now: dict) -> None:
    changed = [f"cell '{name}' is gone" for name in then["cells"] if name not in now["cells"]]
    for name, cell in now["cells"].items():
        before = then["cells"].get(name)
        if before is None:
            continue
        where = f"cell '{name}', " if name else ""
        settings = {key for key, value in cell["config"].items() if key not in RESUMABLE and before["config"].get(key) != value}
        changed += [f"{where}{key} was {before['config'].get(key)}, now {cell['config'][key]}" for key in sorted(settings)]
        changed += [
            f"{where}arm '{arm}' was {own}, now {cell['arms'].get(arm, 'gone')}"
            for arm, own in before["arms"].items()
            if cell["arms"].get(arm) != own
        ]
    if changed:
        raise RunError(f"{file.parent} was made with another study: {'; '.join(changed)}. Give another --run_name, or --overwrite")


class _Workers:
    """Starts workers, watches them, and replaces one that crashed while pairs are left."""

    def __init__(self, pairs: list[Pair], run_dir: Path, count: int, interrupts: Interrupts, tell: Callable[[str], None]) -> None:
        self.pairs, self.run_dir, self.interrupts, self.tell = pairs, run_dir, interrupts, tell
        self.count = min(count, len(pairs))
        self.running: dict[int, subprocess.Popen] = {}  # by number
        self.told = {pair.name for pair in pairs if pair.ended}

    def run(self) -> None:
        """Until every pair has ended or the study is asked to stop."""
        left = [pair for pair in self.pairs if not pair.ended]
        self.tell(f"{len(self.pairs)} pairs of arm and seed, {len(self.pairs) - len(left)} finished before, {self.count} at a time")
        for number in range(min(self.count, len(left))):
            self._start(number)
        try:
            while self.running:
                if self.interrupts.requested is not None:
                    self._stop()
                time.sleep(WAIT)
                self._tell_news()
                for number, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[number]
                        self._ended(number, process)
            self.interrupts.check()  # workers get a terminal's Ctrl-C too, and may all have stopped by themselves
        finally:
            for process in self.running.values():
                process.kill()

    def _start(self, number: int) -> None:
        threads = str(max(1, cores() // self.count))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", "iterbatch", "worker", str(self.run_dir)]
        with self._log(number).open("ab") as log:
            self.running[number] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _log(self, number: int) -> Path:
        return self.run_dir / WORKERS / f"worker{number}.log"

    def _ended(self, number: int, process: subprocess.Popen) -> None:
        """A worker has nothing left to do, was stopped, or has crashed: then so has its pair."""
        if process.returncode == 0 or self.interrupts.requested is not None:
            return
        claimed = [pair for pair in self.pairs if not pair.ended and _claimed_by(pair, process.pid)]
        for pair in claimed:
            _claim(pair).unlink(missing_ok=True)
            pair.fail(f"its process ended with exit code {process.returncode}")
        self._tell_news()
        last = self._log(number).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        if not claimed:
            self._terminate()
            raise RunError("a worker could not begin:\n" + "\n".join(last))
        if any(not pair.ended for pair in self.pairs):
            self._start(number)

    def _tell_news(self) -> None:
        for pair in self.pairs:
            if pair.name not in self.told and pair.ended:
                self.told.add(pair.name)
                self.tell(f"[{len(self.told)}/{len(self.pairs)}] {pair.name}: {outcome(pair)}")

    def _stop(self) -> None:
        """Ask all workers to make a checkpoint and stop; wait for them.

        Raises:
            Stopped: always.
        """
        self._terminate()
        raise Stopped(self.interrupts.requested or signal.SIGTERM)

    def _terminate(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()
        self.running.clear()


def broken(pair: Pair) -> bool:
    """Whether a pair has crashed or diverged."""
    if (pair.folder / FAILED).exists():
        return True
    from iterbatch.report.summary import read_result

    return bool(read_result(pair.folder).get("stopped"))


def _claimed_by(pair: Pair, pid: int) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(_claim(pair).read_text(encoding="utf-8"))["pid"] == pid
    return False


def outcome(pair: Pair) -> str:
    """How a pair ended, in a few words."""
    if (pair.folder / FAILED).exists():
        return f"failed: {reason_of(pair.folder)}"
    from iterbatch.report.summary import read_result

    result = read_result(pair.folder)
    ppl = "not finite" if result["val_ppl"] is None else f"{result['val_ppl']:,.3f}"
    stopped = f", stopped early: {result['stopped']}" if result.get("stopped") else ""
    return f"validation perplexity {ppl}, {result['train_seconds']:,.0f} s{stopped}"


def reason_of(arm: Path) -> str:
    """Why a pair failed, as its folder says."""
    try:
        return str(json.loads((arm / FAILED).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return "for a reason that cannot be read"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
