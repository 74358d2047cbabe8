"""A study while it is trained: its page, its bars, and when it will end."""

import io
import re

import pytest
from rich.console import Console
from support.runs import Notes

from iterbatch.checks import make_config
from iterbatch.cli.progress import StudyProgress
from iterbatch.records.course import Course, Pace, Running, about
from iterbatch.report import growing
from iterbatch.study import live
from iterbatch.study.run import run as run_bench

REFRESH = '<meta http-equiv="refresh"'


class Pages(Notes):
    """Keeps every page that there was while it was trained."""

    def __init__(self, run_dir):
        super().__init__()
        self.run_dir, self.pages = run_dir, []

    def arm_done(self, result):
        self.look()

    def look(self):
        page = self.run_dir / "report.html"
        if page.exists():
            self.pages.append(
                (page.read_text(encoding="utf-8"), (self.run_dir / "report.md").read_text("utf-8"))
            )


@pytest.fixture
def at_every_batch(monkeypatch):
    """Reports are written after every batch."""
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    monkeypatch.setattr(live, "REST", 0.0)
    monkeypatch.setattr("iterbatch.study.engines.in_process.TOLD_EVERY", 0.0)


def _run(tiny, tmp_path, listener, **more):
    flags = tiny | {"strategies": ["baseline", "abr"], "save_dir": tmp_path, "run_name": "run"} | more
    return run_bench(make_config(**flags), listener)


def test_the_page_grows_with_the_run(tiny, tmp_path, at_every_batch):
    listener = Pages(tmp_path / "run")
    run_dir = _run(tiny, tmp_path, listener)
    (first, text), (second, _) = listener.pages
    for page in (first, second):
        assert REFRESH in page
        assert "Still in training at" in page
        assert "Unfinished, no verdict yet" in page
    assert "0 of 2 runs have ended" in first
    assert "1 of 2 runs have ended" in second
    assert re.search(r'<th scope="row">baseline/seed0</th><td [^>]*>\d+%</td><td [^>]*>\d\.\d+</td>', first)
    assert "- baseline/seed0: " in text
    assert "Final test perplexity" in second  # what is done is reported
    done = (run_dir / "report.html").read_text(encoding="utf-8")
    assert REFRESH not in done
    assert "Still in training" not in done
    assert "Unfinished" not in done
    assert not [*run_dir.rglob("so_far*")]


class Interrupts(Pages):
    """Is interrupted by Ctrl-C at a batch."""

    def batch_done(self, record, fraction):
        if record.batch == 3:
            raise KeyboardInterrupt


def test_a_stopped_run_leaves_a_page_that_waits_for_nothing(tiny, tmp_path, at_every_batch):
    with pytest.raises(KeyboardInterrupt):
        _run(tiny, tmp_path, Interrupts(tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert REFRESH not in page
    assert "Stopped at" in page
    assert "Unfinished" in page


def test_a_page_that_cannot_be_written_ends_no_training(tiny, tmp_path, at_every_batch, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a figure")

    monkeypatch.setattr(growing, "write", broken)
    listener = Notes()
    run_dir = _run(tiny, tmp_path, listener)
    assert (run_dir / "report.html").exists()  # the one at the end
    assert any("the report so far could not be written (a figure)" in note for note in listener.notes)


def test_pages_take_no_time_from_the_clock_and_change_nothing(tiny, tmp_path, at_every_batch):
    """Between two batches an arm's clock stands still."""
    live_dir = _run(tiny, tmp_path / "live", Notes(), strategies=["baseline"])
    live.EVERY_S = 1e9
    plain_dir = _run(tiny, tmp_path / "plain", Notes(), strategies=["baseline"])
    losses = [
        re.findall(r'"losses": \[([^\]]*)', (run / "baseline/seed0/batches.jsonl").read_text("utf-8"))
        for run in (live_dir, plain_dir)
    ]
    assert losses[0] == losses[1]


def test_an_estimate_follows_the_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("iterbatch.records.course.time.monotonic", lambda: now[0])
    pace = Pace()
    assert pace.left(0.0, 1.5) is None
    now[0] += 30
    assert pace.left(0.5, 1.0) == pytest.approx(60.0)
    now[0] += 60
    assert pace.left(1.5, 0.0) == 0.0
    assert [about(seconds) for seconds in (0.2, 89, 600, 7200, 4 * 86400)] == [
        "1 s",
        "89 s",
        "10 min",
        "2 h 0 min",
        "4 days",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_bars_fit_the_terminal_and_show_loss_and_time_left(width, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    running = (
        Running("a_rather_long_cell_name/a_rather_long_arm_name/seed12", tmp_path, 0.25, 3.14159),
        Running("abr/seed0", tmp_path, 0.5, 2.0, "scoring validation and test"),
    )
    with StudyProgress(console) as bars:
        bars.notify("[1/4] baseline/seed0: validation perplexity 47.830, 19 s")
        bars.show(Course(4, 1, running, 754.0))
        bars.progress.refresh()
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    for words in ("1/4  13 min left", "loss 3.142", "scoring validation and test", "25%", "47.830, 19 s"):
        assert any(words in line for line in lines), words


def test_in_a_file_a_line_now_and_then(monkeypatch, tmp_path):
    screen = io.StringIO()
    monkeypatch.setattr("iterbatch.cli.progress.EVERY_S", 0.0)
    course = Course(4, 1, (Running("abr/seed0", tmp_path, 0.5, 2.0),), 754.0)
    with StudyProgress(Console(file=screen, width=80)) as bars:
        bars.show(course)
    assert screen.getvalue() == "1 of 4 runs, 13 min left; in training: abr/seed0 50%\n"
    screen = io.StringIO()
    with StudyProgress(Console(file=screen, width=80), quiet=True) as bars:
        bars.show(course)
        bars.notify("a note")
    assert screen.getvalue() == ""
