"""Workers of a comparison: they end with their parent, are replaced, and hold up nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import psutil
import pytest
from conftest import ROOT
from support.studies import study_file

from iterbatch.cli.main import main
from iterbatch.errors import RunError
from iterbatch.records import layout
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.study.engines import claims, processes, worker
from iterbatch.study.engines.processes import Watch, end, threads_to_share
from iterbatch.study.pairs import pairs_of
from iterbatch.study.run import compare
from iterbatch.study.study_file import load_study
from iterbatch.study.study_folder import begin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="signals of Unix"),
]


def _until(condition, seconds=120):
    end_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_at, "waited too long"
        time.sleep(0.02)


def _claimed(run_dir):
    """Process numbers of the workers that are training a pair."""
    found = []
    for file in (run_dir / layout.WORKERS).glob("*~*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append(json.loads(file.read_text(encoding="utf-8"))["pid"])
    return found


@pytest.fixture
def file(tmp_path, tiny_folder):
    return study_file(tmp_path, tiny_folder, {"baseline": None, "fixed2": {"strategy": "fixed"}}, seeds=[0])


def test_an_orphan_that_has_claimed_nothing_yet_is_ended(file, tmp_path):
    study, run_dir, said = load_study(file), tmp_path / "run", []
    run_dir.mkdir()
    begin(study, run_dir)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as orphan:
        psutil.Process(orphan.pid).suspend()
        known = json.dumps(asdict(claims.Claim.of(orphan.pid)))
        (run_dir / layout.WORKERS / "worker3.json").write_text(known, encoding="utf-8")
        processes.end_orphans(pairs_of(study, run_dir), said.append)
        assert orphan.poll() is not None or not psutil.pid_exists(orphan.pid)
    assert said == [f"a worker of an earlier start, process {orphan.pid}, is ended first"]
    other = json.dumps(asdict(claims.Claim.of(os.getpid())) | {"began": 1.0})  # the number of another process
    (run_dir / layout.WORKERS / "worker3.json").write_text(other, encoding="utf-8")
    processes.end_orphans(pairs_of(study, run_dir), said.append)
    assert len(said) == 1


@pytest.mark.parametrize("halted", [False, True], ids=["going on", "halted"])
def test_after_the_parent_is_killed_the_same_command_at_once_reports_the_whole(
    file, tmp_path, halted, capsys
):
    command = [sys.executable, "-m", "iterbatch", "compare", str(file), "--workers", "1"]
    run_dir = tmp_path / "study"
    with subprocess.Popen(
        [*command, "--save_dir", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as parent:
        _until(lambda: _claimed(run_dir))
        orphan = psutil.Process(_claimed(run_dir)[0])
        if halted:
            orphan.suspend()
        parent.kill()
    assert main(["compare", str(file), "--workers", "1", "--save_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        f"a worker of an earlier start, process {orphan.pid}, is ended first" in " ".join(said.split())
        or not halted
    )
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert len(list(run_dir.rglob(layout.RESULT))) == 2
    assert not list(run_dir.rglob(layout.FAILED))
    assert not (run_dir / "report.md").read_text(encoding="utf-8").startswith("**Unfinished")


def test_a_worker_without_a_parent_ends_by_itself(tmp_path, file):
    code = "from iterbatch.study.engines.worker import end_with_parent; import time\n"
    code += "end_with_parent(); print('ready', flush=True); time.sleep(100)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        assert process.wait(30) == -signal.SIGTERM


def test_a_worker_that_is_stopped_from_outside_is_replaced(file, tmp_path):
    said, run_dir = [], tmp_path / "run"
    study = load_study(file)
    thread = threading.Thread(target=compare, args=(study, run_dir, processes.Processes(1, said.append)))
    thread.start()
    _until(lambda: _claimed(run_dir))
    os.kill(_claimed(run_dir)[0], signal.SIGTERM)
    thread.join()
    assert "worker 0 was stopped from outside; another takes its place" in said
    assert len(list(run_dir.rglob(layout.RESULT))) == 2
    assert not list(run_dir.rglob(layout.FAILED))


def test_workers_that_are_stopped_again_and_again_are_given_up(file, tmp_path, monkeypatch):
    study, run_dir = load_study(file), tmp_path / "run"
    run_dir.mkdir()
    begin(study, run_dir)
    watch = Watch(pairs_of(study, run_dir), 1, Interrupts(), lambda _: None)
    monkeypatch.setattr(processes, "WAIT", 0.01)

    def start(number):
        watch._log(number).touch()
        watch.running[number] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(143)"])

    monkeypatch.setattr(watch, "start", start)
    with pytest.raises(RunError, match="stopped from outside, 6 in a row"):
        watch.run()


DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(1, flush=True)
time.sleep(100)
"""
HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print(1, flush=True)
time.sleep(100)
"""


def test_a_worker_that_does_not_answer_is_ended_after_its_time_of_grace(file, tmp_path, monkeypatch):
    study, run_dir, said = load_study(file), tmp_path / "run", []
    run_dir.mkdir()
    begin(study, run_dir)
    interrupts = Interrupts()
    watch = Watch(pairs_of(study, run_dir), 1, interrupts, said.append)
    monkeypatch.setattr(worker, "GRACE", 1.0)
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) as deaf:
        deaf.stdout.readline()

        def start(number):
            watch.running[number] = deaf
            interrupts.requested = signal.SIGINT

        monkeypatch.setattr(watch, "start", start)
        with pytest.raises(Stopped):
            watch.run()
    assert "worker 0 did not stop within 1 s and was ended" in said


def test_a_halted_process_hears_that_it_is_to_stop():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as process:
        known = psutil.Process(process.pid)
        known.suspend()
        assert end([known]) == []


def test_threads_are_those_the_user_set(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_to_share() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert threads_to_share() == processes.cores()


def test_a_comparison_that_is_held_a_folder_that_is_gone_and_a_clock_set_back(file, tmp_path, capsys):
    command = ["compare", str(file), "--workers", "1", "--save_dir", str(tmp_path)]
    run_dir = tmp_path / "study"
    assert main(command) == 0
    result = run_dir / "fixed2/seed0" / layout.RESULT
    before = json.loads(result.read_text(encoding="utf-8"))
    for path in [*(run_dir / "fixed2/seed0").rglob("*")]:
        path.unlink() if path.is_file() else None
    ahead = time.time() + 86_400
    for path in run_dir.rglob("*"):
        os.utime(path, (ahead, ahead))
    holder = [sys.executable, "-c", HOLDER, str(run_dir / layout.LOCK)]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert main(command) == 2
        assert "is in use by" in " ".join(capsys.readouterr().err.split())
        other.kill()
    assert main(command) == 0
    after = json.loads(result.read_text(encoding="utf-8"))
    assert (after["val_ppl"], after["flops"]) == (before["val_ppl"], before["flops"])


def test_a_pair_whose_folder_cannot_be_written_says_so(file, tmp_path):
    study, run_dir = load_study(file), tmp_path / "run"
    run_dir.mkdir()
    begin(study, run_dir)
    (run_dir / "baseline").write_text("no folder", encoding="utf-8")
    with pytest.raises(RunError, match=r"baseline/seed0 failed .*its folder cannot be written"):
        processes._fail(pairs_of(study, run_dir)[0], "it crashed")
