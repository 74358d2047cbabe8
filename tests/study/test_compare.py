"""A comparison from the study file to the page: workers, what fails, what is shared, the report."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from support.browser import BROWSER, QUIET
from support.records import change_result, only_seeds
from support.studies import ARMS, study_file

from iterbatch.checks import make_config
from iterbatch.cli.main import main
from iterbatch.errors import RunError
from iterbatch.records.layout import FAILED, STUDY, WORKERS
from iterbatch.records.record import BatchRecord, read_records
from iterbatch.report import page
from iterbatch.report.answers import answer_line, answers, conclusion
from iterbatch.report.comparison import read_cells
from iterbatch.runtime.interrupt import Interrupts, Stopped
from iterbatch.study.engines import in_process
from iterbatch.study.engines.claims import claim_in_turn
from iterbatch.study.engines.processes import Processes, Watch
from iterbatch.study.engines.worker import work
from iterbatch.study.pairs import pairs_of
from iterbatch.study.run import compare
from iterbatch.study.run import run as run_bench
from iterbatch.study.study_file import load_study
from iterbatch.study.study_folder import begin

pytestmark = pytest.mark.pictures


def _until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory, tiny_folder):
    """A comparison by two workers, one of which is killed while it trains abr with seed 1.

    Then a copy of the folder, and all that was said.
    """
    folder = tmp_path_factory.mktemp("compare")
    file = study_file(folder, tiny_folder, ARMS)
    command = [
        sys.executable,
        "-m",
        "iterbatch",
        "compare",
        str(file),
        "--workers",
        "2",
        "--save_dir",
        str(folder),
    ]
    run_dir, claim = folder / "study", folder / "study" / WORKERS / "abr~seed1.json"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", cwd=ROOT
    ) as process:
        pid = []

        def claimed():
            with contextlib.suppress(OSError, ValueError, KeyError):
                pid.append(json.loads(claim.read_text(encoding="utf-8"))["pid"])
            return bool(pid) or process.poll() is not None

        _until(claimed)
        assert pid, process.stdout.read()
        os.kill(pid[0], signal.SIGKILL)
        said = process.stdout.read()
    return run_dir, file, process.returncode, said


@pytest.fixture(scope="module")
def run_dir(crashed, tmp_path_factory):
    """The comparison after the same command was given again."""
    again = tmp_path_factory.mktemp("again") / "study"
    shutil.copytree(crashed[0], again)
    assert main(["compare", str(crashed[1]), "--save_dir", str(again.parent), "--workers", "1"]) == 0
    return again


def test_a_crashed_pair_fails_alone(crashed):
    run_dir, _, code, said = crashed
    assert code == 0, said
    reasons = {
        str(file.parent.relative_to(run_dir)): json.loads(file.read_text(encoding="utf-8"))["reason"]
        for file in run_dir.rglob(FAILED)
    }
    assert reasons.pop("abr/seed1") == f"its process ended with exit code -{int(signal.SIGKILL)}"
    assert set(reasons) == {"permuted/seed1", "small_batches/seed1"}  # what is made from it
    assert all("made from abr/seed1, which failed" in reason for reason in reasons.values())
    assert len(list(run_dir.rglob("result.json"))) == 12 - 3
    assert "12 pairs of arm and seed, 0 finished before, 2 at a time" in said
    assert "failed" in said
    (cell,) = read_cells(run_dir)
    found = {each.arm: each for each in cell.against_baseline}
    assert math.isinf(found["abr"].estimate)
    assert found["abr"].verdict == "failed"
    assert math.isfinite(found["fixed2"].estimate)
    shown = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "Failed, and scored as infinity" in shown
    assert "∞" in shown


def test_the_same_command_trains_what_is_missing_and_nothing_else(crashed, run_dir):
    assert not list(run_dir.rglob(FAILED))
    assert len(list(run_dir.rglob("result.json"))) == 12
    for file in crashed[0].rglob("result.json"):
        assert file.read_bytes() == (run_dir / file.relative_to(crashed[0])).read_bytes()


def test_arms_of_a_seed_share_adapter_order_and_evaluation(run_dir):
    def first(arm, seed):
        return next(iter(read_records(run_dir / arm / f"seed{seed}" / "batches.jsonl", BatchRecord)))

    whole = ("baseline", "abr", "permuted", "spaced", "fixed2")  # small_batches trains a part first
    for seed in (0, 1):
        starts = {(first(arm, seed).initial_loss, first(arm, seed).gradient_norm) for arm in whole}
        assert len(starts) == 1  # the loss says which batch, the gradient which adapter
        documents = {
            (run_dir / arm / f"seed{seed}" / "documents.json").read_text(encoding="utf-8").split('"nats"')[0]
            for arm in ARMS
        }
        assert len(documents) == 1
    assert first("baseline", 0).initial_loss != first("baseline", 1).initial_loss
    assert first("baseline", 0).gradient_norm != first("baseline", 1).gradient_norm
    tokens = {
        tuple(json.loads(file.read_text(encoding="utf-8"))["test"]["tokens"])
        for file in run_dir.rglob("documents.json")
    }
    assert len(tokens) == 1


def test_permuted_hands_out_its_sources_repeats(run_dir):
    def records(arm, seed):
        return list(read_records(run_dir / arm / f"seed{seed}" / "batches.jsonl", BatchRecord))

    for seed in (0, 1):
        source = [record.repeats_done for record in records("abr", seed)]
        shuffled = [record.repeats_planned for record in records("permuted", seed)]
        assert len(set(source)) > 1
        whole = len(shuffled) // len(source) * len(source)
        assert sorted(shuffled[:whole]) == sorted(source * (whole // len(source)))
        assert len(shuffled) >= len(source) - 1


def test_every_arm_costs_what_the_baseline_costs(run_dir):
    (cell,) = read_cells(run_dir)
    budget = cell.arm("baseline").mean(lambda result: result.flops)
    a_pass = budget / cell.arm("baseline").mean(lambda result: result.updates)
    for arm in cell.arms:
        assert all(abs(each.result.flops - budget) <= a_pass * 1.001 for each in arm.seeds), arm.name


def test_a_report_is_made_again_from_records_alone(run_dir, tmp_path, capsys):
    copy = tmp_path / "study"
    shutil.copytree(run_dir, copy)
    made = ["report.html", "report.md", "metrics.csv"]
    before = {name: (copy / name).read_text(encoding="utf-8") for name in made}
    for name in made:
        (copy / name).unlink()
    shutil.rmtree(copy / "figures")
    for file in [*copy.rglob("*.safetensors"), *copy.rglob("adapter_config.json")]:
        file.unlink()
    assert main(["report", str(copy)]) == 0
    assert {name: (copy / name).read_text(encoding="utf-8") for name in made} == before
    assert "Does the loss signal matter" in capsys.readouterr().out
    drawn = {file.suffix for file in (copy / "figures").iterdir()}
    assert drawn == {".pdf", ".png"}


def test_what_the_page_says(run_dir):
    html, text = ((run_dir / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for shown in (html, text):
        assert "For the same compute" in shown
        assert "95% intervals by the method" in shown
        for metric in ("distinct-1", "rep-4", "self-BLEU", "length"):
            assert metric in shown
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(pictures) == html.count("<figure ") >= 7
    for link in (
        pictures
        + re.findall(r'href="([^"#]+)"', html)
        + re.findall(r"\]\(([^)]+)\)", text.split("### Records")[1])
    ):
        assert (run_dir / link).exists(), link
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(re.findall(r'id="([^"]+)"', html))
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)  # nothing is fetched; namespaces are only names
    rows = (run_dir / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 12
    assert len({row.count(",") for row in rows}) == 1


def test_text_of_the_data_is_inert(run_dir):
    html, text = ((run_dir / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "&lt;script&gt;" in html or "&lt;/title&gt;" in html  # it is shown
    assert "<script" not in html
    assert "<img" not in html
    assert "\x1b" not in html + text


@pytest.mark.parametrize("kind", ["cut", "damaged", "other version"])
def test_a_line_that_cannot_be_read_is_skipped_and_counted(run_dir, tmp_path, kind):
    copy = tmp_path / "study"
    shutil.copytree(run_dir, copy)
    change_result(copy / "abr/seed0")  # an earlier version kept no digests
    file = copy / "abr/seed0/evals.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[1] = {"cut": lines[1][:20], "damaged": "\0\0", "other version": '{"format": 99, "loss": 3}'}[kind]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["report", str(copy)]) == 0
    assert "1 lines of records could not be read" in (copy / "report.md").read_text(encoding="utf-8")


def test_with_one_seed_there_are_no_intervals_and_the_page_says_so(run_dir, tmp_path, capsys):
    copy = tmp_path / "study"
    shutil.copytree(run_dir, copy)
    for seed in copy.glob("*/seed1"):
        shutil.rmtree(seed)
    only_seeds(copy, 0)
    assert main(["report", str(copy)]) == 0
    shown = (copy / "report.md").read_text(encoding="utf-8")
    assert "fewer than two seeds, so there are no intervals" in shown
    assert "[+" not in shown
    assert "[-" not in shown
    assert main(["power", str(copy)]) == 2
    assert "no arm with two seeds" in " ".join(capsys.readouterr().err.split())


def _lines(cell):
    return " ".join(map(answer_line, answers(cell)))


def _changed(run_dir, copy, arm, seed, **values):
    """A copy of a comparison in which a result says something else."""
    if not copy.exists():
        shutil.copytree(run_dir, copy)
    change_result(copy / arm / f"seed{seed}", **values)
    return copy


def test_a_control_that_failed_is_told_and_so_is_a_baseline(run_dir, tmp_path):
    (cell,) = read_cells(_changed(run_dir, tmp_path / "one", "fixed2", 0, stopped="it diverged"))
    told = next(each for question, each in cell.questions if each.reference == "fixed2")
    assert told.verdict == "reference failed"
    assert "fixed2 failed with a seed that abr finished" in _lines(cell)
    (cell,) = page.write(_changed(run_dir, tmp_path / "two", "baseline", 1, stopped="it diverged"))
    assert conclusion(cell) == "There is nothing to compare: the baseline failed with seed 1."


def test_a_final_loss_that_is_not_finite_is_a_failure(run_dir, tmp_path):
    (cell,) = page.write(_changed(run_dir, tmp_path / "study", "fixed2", 0, val_ppl=None, test_ppl=None))
    assert cell.arm("fixed2").failures[0].failed == "its final loss is not finite"


def test_arms_that_trained_alike_are_not_called_a_null_result(run_dir, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "fixed2")
    shutil.copytree(copy / "abr", copy / "fixed2")
    (cell,) = read_cells(copy)
    assert "Not tested: abr and fixed2 trained alike" in _lines(cell)


def test_folders_with_nothing_to_report(tmp_path, run_dir, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "none")]) == 2
    copy = tmp_path / "study"
    shutil.copytree(run_dir, copy)
    (copy / "abr/seed0/result.json").write_text("{", encoding="utf-8")
    assert main(["report", str(copy)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has no finished arm" in said
    assert "is not a folder" in said
    assert "is damaged" in said
    assert "Traceback" not in said


def test_mauve_needs_its_package_and_a_model_and_then_scores_every_arm(
    run_dir, tmp_path, capsys, monkeypatch
):
    import types

    monkeypatch.setitem(sys.modules, "mauve", None)
    assert main(["report", str(run_dir), "--mauve", str(tmp_path)]) == 2
    assert 'pip install "iterbatch[mauve]"' in " ".join(capsys.readouterr().err.split())
    stand_in = types.ModuleType("mauve")  # tells only whether the texts were embedded side by side
    stand_in.compute_mauve = lambda p_features, q_features, **_: types.SimpleNamespace(
        mauve=float(len(p_features) == len(q_features) == 2)
    )
    monkeypatch.setitem(sys.modules, "mauve", stand_in)
    assert main(["report", str(run_dir), "--mauve", str(tmp_path)]) == 2
    assert "has no config.json" in " ".join(capsys.readouterr().err.split())
    copy = tmp_path / "study"
    shutil.copytree(run_dir, copy)
    model = json.loads((copy / "study.json").read_text(encoding="utf-8"))["cells"][""]["config"]["model_name"]
    assert main(["report", str(copy), "--mauve", model]) == 0
    row = next(
        line
        for line in (copy / "report.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| abr | sampled |")
    )
    assert " 1.000 " in row


def test_power(run_dir, capsys):
    assert main(["power", str(run_dir), "--effect", "0.02"]) == 0
    said = capsys.readouterr().out
    assert "fixed2" in said
    assert "0.02" in said
    assert main(["power", str(run_dir), "--effect", "0"]) == 2
    assert main(["power", str(run_dir), "--power", "1.5"]) == 2


@pytest.mark.slow
def test_another_study_does_not_go_into_the_same_folder(run_dir, crashed, tmp_path, tiny_folder, capsys):
    other = study_file(tmp_path, tiny_folder, ARMS, lr=0.02)
    text = other.read_text(encoding="utf-8").replace(
        str(tmp_path / "data.jsonl"), str(crashed[1].parent / "data.jsonl")
    )
    other.write_text(text, encoding="utf-8")
    assert main(["compare", str(other), "--save_dir", str(run_dir.parent)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was made with another study" in said
    assert "lr was 0.01, now 0.02" in said
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.txt").write_text("mine", encoding="utf-8")
    assert main(["compare", str(other), "--save_dir", str(tmp_path)]) == 2
    assert (tmp_path / "study" / "mine.txt").exists()


# -- in one process ---------------------------------------------------------------------------------- -----


def _begin(tmp_path, tiny_folder, arms, **settings):
    """A study's folder with its study written, and nothing trained."""
    study = load_study(study_file(tmp_path, tiny_folder, arms, **settings))
    run_dir = tmp_path / "study"
    run_dir.mkdir()
    begin(study, run_dir)
    return study, run_dir


def test_an_arm_that_raises_or_diverges_is_infinity_and_the_others_go_on(tiny_folder, tmp_path, monkeypatch):
    real = in_process.train_arm

    def train(shared, arm, seed, folder, listener):
        if (arm.name, seed) == ("fixed2", 0):
            raise ValueError("something broke")
        return real(shared, arm, seed, folder, listener)

    monkeypatch.setattr(in_process, "train_arm", train)
    arms = {"baseline": None, "fixed2": {"strategy": "fixed"}, "wild": {"strategy": "fixed", "lr": 1e30}}
    study, run_dir = _begin(tmp_path, tiny_folder, arms, max_train_tokens=2048, batch_size=1)
    work(run_dir)
    assert [pair.ended for pair in pairs_of(study, run_dir)] == [True] * 6
    assert (
        json.loads((run_dir / "fixed2/seed0" / FAILED).read_text(encoding="utf-8"))["reason"]
        == "ValueError: something broke"
    )
    (cell,) = page.write(run_dir)
    found = {each.arm: each for each in cell.against_baseline}
    assert found["wild"].verdict == found["fixed2"].verdict == "failed"
    assert all("10 batches in a row" in each.failed for each in cell.arm("wild").failures)
    assert cell.arm("baseline").failures == []


@pytest.mark.parametrize("unit", ["updates", "tokens", "seconds", "epochs"])
def test_other_budgets(tiny_folder, tmp_path, unit):
    arms = {"baseline": None, "fixed2": {"strategy": "fixed"}}
    _, run_dir = _begin(tmp_path, tiny_folder, arms, match=unit, seeds=[0], prompts=1, evals=2)
    work(run_dir)
    results = {
        arm: json.loads((run_dir / arm / "seed0" / "result.json").read_text(encoding="utf-8")) for arm in arms
    }
    key = {"updates": "updates", "tokens": "tokens_trained", "seconds": "train_seconds", "epochs": "batches"}[
        unit
    ]
    one, two = results["baseline"][key], results["fixed2"][key]
    slack = {"updates": 1, "tokens": 64, "seconds": 0.75 * one, "epochs": 0}[unit]
    assert abs(one - two) <= slack
    for result in results.values():  # scored on all axes
        assert all(result[axis] > 0 for axis in ("flops", "train_seconds", "tokens_trained", "updates"))


def test_baseline_against_itself_with_other_seeds_is_no_difference(tiny, tmp_path):
    """A null study: the same arm under two names must not differ."""
    flags = tiny | {
        "strategies": ["baseline"],
        "seeds": [0, 1, 2, 3, 4, 5],
        "evals": 2,
        "prompts": 1,
        "max_eval_tokens": 800,
    }
    run_dir = run_bench(make_config(**flags | {"save_dir": tmp_path, "run_name": "run"}))
    for seed in (3, 4, 5):
        shutil.move(run_dir / f"baseline/seed{seed}", run_dir / f"same/seed{seed - 3}")
    only_seeds(run_dir, 0, 1, 2)
    (cell,) = page.write(run_dir)
    (same,) = cell.against_baseline
    assert same.seeds == [0, 1, 2]
    assert same.interval.low < 0 < same.interval.high
    assert same.verdict == "no difference found"
    assert "no arm beat the baseline beyond chance: the nearest, same ended with" in conclusion(cell)


def test_a_leftover_claim_is_left_to_the_parent(tiny_folder, tmp_path):
    """A crashed worker's pair is recorded as failed by who started it, not trained by another worker."""
    study, run_dir = _begin(
        tmp_path, tiny_folder, {"baseline": None, "fixed2": {"strategy": "fixed"}}, seeds=[0]
    )
    first, second = pairs_of(study, run_dir)
    claim = run_dir / WORKERS / "baseline~seed0.json"
    claim.write_text('{"pid": 1}', encoding="utf-8")
    claims = claim_in_turn([first, second])
    assert next(claims) is second
    claims.close()
    assert claim.exists()
    assert not first.ended


@pytest.mark.slow
def test_a_stop_that_workers_answered_first_is_still_a_stop(tiny_folder, tmp_path, monkeypatch):
    study, run_dir = _begin(tmp_path, tiny_folder, {"baseline": None}, seeds=[0])
    interrupts = Interrupts()
    workers = Watch(pairs_of(study, run_dir), 1, interrupts, lambda _: None)
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(143)"])
    ended.wait()

    def start(number):
        workers.running[number] = ended
        interrupts.requested = signal.SIGINT

    monkeypatch.setattr(workers, "start", start)
    monkeypatch.setattr(workers, "stop", lambda: None)  # all had gone when it was asked for
    with pytest.raises(Stopped):
        workers.run()


@pytest.mark.slow
def test_workers_that_cannot_begin_say_why(tiny_folder, tmp_path):
    study = load_study(study_file(tmp_path, tiny_folder, {"baseline": None}))
    (tmp_path / "data.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="could not begin"):
        compare(study, tmp_path / "run", Processes(1))
    assert (tmp_path / "run" / STUDY).exists()


# -- in a browser ------------------------------------------------------------------------------------ -----

MEASURE = """<script>
addEventListener("load", () => setTimeout(() => {
  const figures = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  parent.postMessage({
    figures: figures.length,
    shown: figures.filter(box => box.width > 150 && box.height > 100).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    wide: [...document.querySelectorAll("figure, p, li, h1, h2, h3, .scroll, summary")]
      .filter(each => each.getBoundingClientRect().right > innerWidth + 1).length,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("figure svg text, figure svg path, figure svg use")).color,
    title: document.title,
  }, "*");
}, 200));
</script></body>"""
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe src="measured.html" width="{width}" height="900" style="border:0"></iframe>
<script>addEventListener("message", event => document.body.dataset.found =
JSON.stringify(event.data))</script></body>
"""


def _browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    command = [
        BROWSER,
        *QUIET,
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--dump-dom",
        *flags,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=180, check=False)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(run_dir, tmp_path, width, scheme):
    import html as entities

    report = run_dir / "report.html"
    text = report.read_text(encoding="utf-8")
    flags = [
        "--window-size=1400,1000",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
    ]
    _, console = _browse(report, tmp_path / "profile", *flags)
    assert console == ""  # the page itself, under its own policy
    policy = re.search(r"<meta http-equiv=.Content-Security-Policy.*?>", text).group()
    assert "default-src 'none'" in policy
    (tmp_path / "measured.html").write_text(
        text.replace(policy, "").replace("</body>", MEASURE), encoding="utf-8"
    )
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    shown, _ = _browse(tmp_path / "frame.html", tmp_path / "profile", *flags)
    found = json.loads(entities.unescape(re.search(r'data-found="([^"]*)"', shown).group(1)))
    assert found["figures"] == found["shown"] >= 7
    assert found["overflow"] <= 0
    assert found["wide"] == 0
    assert found["title"] == "study"  # no script of the data's has run
    paper, ink = ([int(value) for value in re.findall(r"\d+", found[name])[:3]] for name in ("paper", "ink"))
    assert (sum(paper) < sum(ink)) == (scheme == "dark")
