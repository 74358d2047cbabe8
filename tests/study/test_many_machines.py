"""A comparison over many machines: workers that join its folder, and workers of a Ray cluster."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest
from conftest import ROOT
from filelock import FileLock
from support.runs import stop_at
from support.studies import study_file

from campaigns.crashes import content
from iterbatch.cli.main import main
from iterbatch.errors import ConfigError, RunError
from iterbatch.records import layout
from iterbatch.runtime.interrupt import Stopped
from iterbatch.study.engines import claims, cluster, on_ray, parcel
from iterbatch.study.engines.choose import choose
from iterbatch.study.engines.claims import TRIES, Claim, claim_file
from iterbatch.study.engines.cluster import Share
from iterbatch.study.engines.on_ray import OnRay
from iterbatch.study.engines.processes import Processes, end_orphans
from iterbatch.study.engines.ray_worker import RayWorker
from iterbatch.study.engines.worker import Joined, join, work
from iterbatch.study.pairs import pairs_of
from iterbatch.study.run import compare
from iterbatch.study.study_file import load_study
from iterbatch.study.study_folder import check_joinable, from_folder
from iterbatch.study.tune import tune

ARMS = {"baseline": None, "abr": {"loss_threshold": 2.75}, "permuted": {"source": "abr"}}
ELSEWHERE = Claim(1, 1.0, "another machine")


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_folder):
    """A study of six pairs, two of which are made from others."""
    return study_file(tmp_path_factory.mktemp("file"), tiny_folder, ARMS, evals=1, prompts=1)


@pytest.fixture(scope="module")
def expected(file, tmp_path_factory):
    """What one worker leaves, without reports and claims."""
    folder = tmp_path_factory.mktemp("expected")
    work(_begun(file, folder))
    return _records(folder / "study")


@pytest.fixture
def begun(file, tmp_path):
    """The folder of a study that is begun, and nothing of it trained."""
    return _begun(file, tmp_path)


@pytest.fixture
def reports(monkeypatch):
    """The folders of which a report is written, which takes longer than these pairs."""
    written = []
    monkeypatch.setattr("iterbatch.study.pairs.page.write", lambda run_dir: written.append(run_dir) or [])
    return written


def _begun(file, folder):
    assert main(["compare", str(file), "--save_dir", str(folder), "--workers", "0"]) == 0
    return folder / "study"


def _records(run_dir):
    """Of its pairs, without claims, and without pages, which a report makes."""
    left_out = (layout.WORKERS, layout.SAMPLES_PAGE)
    kept = content(run_dir).items()
    return {
        name: value for name, value in kept if "seed" in name and not any(each in name for each in left_out)
    }


def _pairs(run_dir):
    return {pair.name: pair for pair in pairs_of(from_folder(run_dir), run_dir)}


def _changed_study(run_dir, **values):
    study = run_dir / layout.STUDY
    study.write_text(json.dumps(json.loads(study.read_text(encoding="utf-8")) | values), encoding="utf-8")


# -- workers that join -------------------------------------------------------------------------------------


def test_a_comparison_is_begun_joined_and_reported_by_who_trains_its_last_pair(
    file, expected, monkeypatch, tmp_path, capsys
):
    begun = _begun(file, tmp_path)
    assert f"iterbatch worker {begun}" in capsys.readouterr().out
    assert not list(begun.rglob(layout.RESULT))
    monkeypatch.chdir(tmp_path)  # its text is found from any folder
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            join(begun)
    assert not list((begun / layout.WORKERS).glob("*~*.json"))
    assert main(["worker", str(begun)]) == 0
    said = capsys.readouterr().out
    assert "Pairs trained here: 6" in said
    assert "For the same compute, " in said
    assert _records(begun) == expected
    assert (begun / layout.REPORT).exists()


def test_a_report_is_written_where_it_is_missing_unless_another_process_does(begun, reports):
    for pair in _pairs(begun).values():
        pair.fail("it crashed")
    with FileLock(begun / layout.LOCK):
        assert join(begun) == Joined(0, 0, [])
    assert reports == []
    join(begun)
    assert reports == [begun]
    (begun / layout.REPORT).touch()
    join(begun)
    assert reports == [begun]


def test_a_pair_whose_process_died_elsewhere_is_taken_over_and_failed_after_its_last_try(
    begun, expected, monkeypatch, reports
):
    monkeypatch.setattr(claims, "QUIET", 0.0)
    pairs, said = _pairs(begun), []
    for name, tries in (("baseline/seed0", 1), ("abr/seed0", TRIES), ("baseline/seed1", None)):
        text = "{" if tries is None else json.dumps(asdict(replace(ELSEWHERE, tries=tries)))
        claim_file(pairs[name]).write_text(text, encoding="utf-8")
    seen = []
    real = claims.claimed
    monkeypatch.setattr(claims, "claimed", lambda pair, claim: seen.append(claim) or real(pair, claim))
    joined = join(begun, notify=said.append)
    assert [claim.tries for claim in seen] == [2, 2, 1, 1]
    assert all(claim.joined for claim in seen)
    assert (
        "baseline/seed0: process 1 on 'another machine' ended while it was trained; resumed, try 2 of 3"
        in said
    )
    assert (joined.trained, joined.open) == (4, 0)
    why = "failed: process 1 on 'another machine' ended while it was trained, the last of 3 tries"
    assert pairs["abr/seed0"].outcome == why
    assert "made from abr/seed0, which failed" in pairs["permuted/seed0"].outcome
    of_seed1 = {name: value for name, value in expected.items() if "seed1" in name}
    assert {name: value for name, value in _records(begun).items() if "seed1" in name} == of_seed1


def test_a_process_that_goes_on_while_its_lock_is_free_shows_that_locks_do_not_hold(begun, monkeypatch):
    monkeypatch.setattr(claims, "QUIET", 5.0)
    file = claim_file(_pairs(begun)["baseline/seed0"])
    file.write_text(json.dumps(asdict(ELSEWHERE)), encoding="utf-8")
    goes_on = threading.Timer(
        0.1, file.write_text, [json.dumps(asdict(ELSEWHERE) | {"fraction": 0.5})], {"encoding": "utf-8"}
    )
    goes_on.start()
    with pytest.raises(RunError, match="process 1 on 'another machine' although its lock is free"):
        join(begun)


def test_a_process_that_has_joined_is_no_orphan(begun):
    pairs = [*_pairs(begun).values()]
    mine = Claim.of(os.getpid(), joined=True)
    claim_file(pairs[0]).write_text(json.dumps(asdict(mine)), encoding="utf-8")
    said = []
    end_orphans(pairs, said.append)
    assert said == []


def test_a_comparison_that_is_being_trained_is_not_overwritten(file, begun, capsys):
    words = ["compare", str(file), "--save_dir", str(begun.parent), "--workers", "0", "--overwrite"]
    with claims.lock_of(_pairs(begun)["abr/seed0"]):
        assert main(words) == 2
    assert "abr/seed0 in " in (said := " ".join(capsys.readouterr().err.split()))
    assert "is being trained; stop its worker before --overwrite" in said
    assert main(words) == 0


def test_folders_that_cannot_be_joined(begun, tmp_path, capsys):
    assert main(["worker", str(tmp_path)]) == 2
    assert "holds no comparison; give the folder of one" in " ".join(capsys.readouterr().err.split())
    versions = json.loads((begun / layout.STUDY).read_text(encoding="utf-8"))["versions"]
    assert set(versions) == {"iterbatch", "torch", "transformers", "peft"}
    _changed_study(begun, versions=versions | {"torch": "1.0", "peft": "0.1"})
    assert main(["worker", str(begun)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was begun with torch 1.0, peft 0.1, and this machine has torch " in said
    assert "install here what it was begun with" in said
    _changed_study(begun, versions={})  # an earlier version kept none
    check_joinable(begun)
    kept = json.loads((begun / layout.STUDY).read_text(encoding="utf-8"))["cells"]
    kept[""]["arms"]["mine"] = {"strategy": "TwiceWhenHarder"}
    _changed_study(begun, cells=kept)
    with pytest.raises(ConfigError, match=r"--strategies FILE.py:TwiceWhenHarder"):
        check_joinable(begun)


@pytest.mark.slow
def test_two_workers_share_a_comparison(begun, expected):
    command = [sys.executable, "-m", "iterbatch", "worker", str(begun)]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    counts = [int(text.split("Pairs trained here: ")[1].split()[0]) for text in said]
    assert sum(counts) == 6
    assert _records(begun) == expected
    assert not (begun / "report.md").read_text(encoding="utf-8").startswith("**Unfinished")


# -- which engine ------------------------------------------------------------------------------------------


def test_engines_that_cannot_be_had(monkeypatch, file, tmp_path, capsys):
    assert isinstance(choose("processes", 2, None), Processes)
    assert choose("processes", 0, None) is None
    for given, problem in (
        (("rai", 1, None), r"unknown engine 'rai'.*did you mean 'ray'"),
        (("processes", 1, "here:1"), "add --engine ray"),
        (("ray", 0, None), "--engine ray needs 1 or more"),
        (("ray", 1, "here"), "it is not HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=problem):
            choose(*given)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    words = ["compare", str(file), "--engine", "ray", "--save_dir", str(tmp_path)]
    assert main(words) == 2
    assert 'pip install "iterbatch[ray]"' in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "study").exists()


def test_an_address_where_nobody_answers():
    pytest.importorskip("ray")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ConfigError, match=r"cannot be used \(.*refused"):
            choose("ray", 1, f"127.0.0.1:{closed.getsockname()[1]}")


def test_an_address_of_something_else(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(cluster, "ANSWER", cluster.REACHED + 2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(ConfigError, match="no answer within 2 s"):
            choose("ray", 1, f"127.0.0.1:{deaf.getsockname()[1]}")


def test_a_cluster_that_asks_for_a_token(monkeypatch):
    monkeypatch.setattr(cluster, "_unreached", lambda address: None)
    monkeypatch.setattr(
        cluster, "_unanswered", lambda address: "Unauthenticated: RPC error: InvalidAuthToken"
    )
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
        cluster.need_answer("192.0.2.1:6379")


@pytest.mark.parametrize(
    ("cores", "gpus", "workers", "share"),
    [
        ([8, 8], 0, 2, Share(8, 0.0)),
        ([8, 8], 0, 3, Share(4, 0.0)),
        ([8, 8], 4, 4, Share(4, 1.0)),
        ([8], 3, 4, Share(2, 0.5)),
        ([2], 0, 5, Share(1, 0.0)),
        ([], 0, 1, Share(1, 0.0)),
    ],
)
def test_what_a_worker_is_given_of_a_cluster(cores, gpus, workers, share):
    assert Share.of(cores, gpus, workers) == share


# -- files on their way ------------------------------------------------------------------------------------


def test_files_come_back_as_they_were_and_lead_nowhere_else(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "adapter").mkdir(parents=True)
    (one / "adapter/weights").write_bytes(b"\0\1")
    (one / ".half.part").write_bytes(b"half")
    two.mkdir()
    (two / "old").write_text("old", encoding="utf-8")
    parcel.unpack(parcel.pack(one), two)
    assert [each.relative_to(two).as_posix() for each in sorted(two.rglob("*"))] == [
        "adapter",
        "adapter/weights",
    ]
    for name in ("../out", "/out", "a/../../out", "C:out", "a\\..\\out", "", ".hidden", "a//b"):
        for take in (parcel.unpack, parcel.add_missing):
            with pytest.raises(RunError, match="may lead elsewhere"):
                take({name: b""}, tmp_path / "three")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "two"]


OWN = """
from iterbatch import BaseTrainingStrategy

class Twice(BaseTrainingStrategy):
    def repeats(self, loss):
        return 2
"""


def test_a_worker_without_the_folder_works_in_a_copy_and_goes_on_with_what_another_left_there(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    arms = {"baseline": None, "mine": {"strategy": "mine.py:Twice"}}
    run_dir = _begun(study_file(tmp_path, tiny_folder, arms, seeds=[0], evals=1, prompts=1), tmp_path)
    orders = on_ray._orders(run_dir, "f" * 32, 1, "")
    (tmp_path / "mine.py").unlink()
    copy = tmp_path / "elsewhere" / ("iterbatch-" + "f" * 32)
    first = RayWorker(orders)
    assert first.begin()["shares"] is False
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        stopped = first.train("mine/seed0", {})
    assert stopped["how"] == "stopped"
    kept = [name for name in stopped["pair"] if name.startswith("checkpoint")]
    assert kept
    assert all((copy / "mine/seed0" / name).exists() for name in kept)
    pair = _pairs(run_dir)["mine/seed0"]
    on_ray._bring_back(pair, stopped, "there")
    assert all((pair.folder / name).exists() for name in kept)
    assert on_ray._needed(pair, [pair])["mine/seed0"] == stopped["pair"]
    second = RayWorker(orders)
    assert second.train("mine/seed0", {"../out": {}})["how"] == "broken"
    ended = second.train("mine/seed0", {"": {}, "mine/seed0": {"batches.jsonl": b"older"}})
    assert ended["how"] == "ended"
    assert {layout.RESULT, layout.BATCHES, "adapter/adapter_model.safetensors"} <= set(ended["pair"])
    assert ended["pair"][layout.BATCHES].startswith(stopped["pair"][layout.BATCHES][:40])
    assert set(ended["cell"]) == {layout.MANIFEST}
    assert not [*run_dir.rglob(layout.RESULT)]
    second.clear()
    assert not copy.exists()


# -- Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray():
    """A cluster of this machine, for two workers."""
    pytest.importorskip("ray")
    with cluster.connected(None, 2) as ray:
        yield ray


@pytest.fixture
def crews(monkeypatch):
    """The crews of workers that were made; they are looked at all the time."""
    made, real = [], on_ray.Crew.__init__

    def kept(crew, *given):
        real(crew, *given)
        made.append(crew)

    monkeypatch.setattr(on_ray.Crew, "__init__", kept)
    monkeypatch.setattr(on_ray, "TOLD_EVERY", 0.0)
    return made


@pytest.mark.slow
def test_workers_of_a_cluster_leave_the_same_and_a_lost_one_is_replaced(
    ray, file, expected, tmp_path, crews, reports
):
    said, killed, run_dir = [], [], tmp_path / "study"

    def kill_one(course):
        training = crews[0].training
        if training and not killed:
            killed.append(training[0].pair.name)
            ray.kill(training[0].actor)

    compare(load_study(file), run_dir, OnRay(2, None, said.append, kill_one))
    assert _records(run_dir) == expected
    assert reports == [run_dir]
    assert not [*(run_dir / layout.WORKERS).glob("*.json"), *run_dir.rglob("checkpoint*")]
    assert [text for text in said if text.startswith(f"{killed[0]}: its worker on ")]


@pytest.mark.slow
def test_workers_that_see_no_folder_of_the_study_send_back_what_they_leave_and_stop_when_asked(
    ray, file, expected, tmp_path, crews, reports, monkeypatch
):
    address = ray.get_runtime_context().gcs_address
    monkeypatch.setattr(
        on_ray, "write_text", lambda path, text: path.touch()
    )  # not the mark that they look for
    run_dir, stopped = tmp_path / "study", []

    def stop_once(course):
        if crews[0].training and not stopped:  # it loads the model, or trains already
            stopped.append(crews[0].training[0].pair)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        compare(load_study(file), run_dir, OnRay(1, address, show=stop_once))
    assert not stopped[0].ended
    compare(load_study(file), run_dir, OnRay(1, None))
    assert _records(run_dir) == expected
    assert not [*(run_dir / layout.WORKERS).glob("*.json"), *run_dir.rglob("checkpoint*")]


class Here:
    """Trains in this process, without a report of where it stands."""

    def train(self, pairs):
        work(pairs[0].run_dir)


@pytest.mark.slow
def test_tuning_over_a_cluster_chooses_the_same(ray, tiny_folder, tmp_path, reports):
    chosen = []
    for name, engine in (("one", Here()), ("two", OnRay(1))):
        file = study_file(tmp_path / name, tiny_folder, {"baseline": None}, max_train_tokens=256, prompts=1)
        text = file.read_text(encoding="utf-8")
        file.write_text(text + "tune: {trials: 3, seeds: 1, low: 1e-3, high: 1}\n", encoding="utf-8")
        chosen.append(tune(file, tmp_path / name, engine))
    assert chosen[0] == chosen[1]
