"""The report of a study that is still being trained: what its records say so far, and where it stands."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.course import Course, Running, about
from iterbatch.records.record import EvalRecord, tolerant
from iterbatch.report import figures, page
from iterbatch.report.comparison import CellScores, cells_of
from iterbatch.report.wording import number

RELOAD_S = 30  # seconds after which a page asks for itself anew


@dataclass(frozen=True)
class Now:
    """What a page shows of a study that is being trained."""

    says: str
    rows: list[dict[str, str]]
    drawing: figures.Drawing | None


def write(run_dir: Path, course: Course, *, reload: bool) -> None:
    """Write the report from the records so far, marked as unfinished.

    Args:
        run_dir: Of the study.
        course: Where it stands.
        reload: Whether the page is to look for a newer one by itself.

    Raises:
        RunError: where a record is damaged.
    """
    cells = {cell.name: cell for cell in cells_of(run_dir)}
    ready = {name: cell for name, cell in cells.items() if cell.reportable}
    now = Now(
        _says(course, reload=reload), [_row(each) for each in course.running], _drawn(run_dir, cells, course)
    )
    page.write_growing(run_dir, ready, now, RELOAD_S if reload else 0)


def _says(course: Course, *, reload: bool) -> str:
    until = _("This page loads itself anew until it is done.")
    done = _("{ended} of {pairs} runs have ended").format(ended=course.ended, pairs=course.pairs)
    at = datetime.now().astimezone()
    if not reload:
        return _("Stopped at {at:%Y-%m-%d %H:%M}: {done}. The same command, or --resume, goes on.").format(
            at=at, done=done
        )
    left = ""
    if course.left_s is not None:
        end = at + timedelta(seconds=course.left_s)
        left = _("; about {about} left, until {end:%Y-%m-%d %H:%M}").format(
            about=about(course.left_s), end=end
        )
    return _("Still in training at {at:%Y-%m-%d %H:%M}: {done}{left}. {until}").format(
        at=at, done=done, left=left, until=until
    )


def _row(each: Running) -> dict[str, str]:
    scored = _validations(each.folder)
    return {
        "run": each.name,
        "spent": f"{min(each.fraction, 1.0):.0%}",
        "loss": "-" if each.loss is None else number(each.loss),
        "ppl": number(scored[-1].ppl) if scored else "-",
        "doing": each.doing or "training",
    }


def _validations(folder: Path) -> list[EvalRecord]:
    file = folder / layout.EVALS
    if not file.exists():
        return []
    return [
        each
        for each in tolerant(file, EvalRecord)[0]
        if each.split == "validation" and math.isfinite(each.ppl)
    ]


def _drawn(run_dir: Path, cells: dict[str, CellScores], course: Course) -> figures.Drawing | None:
    """Validation perplexity against FLOPs of every run so far, those in training included."""
    ended = [
        (f"{name}/{arm.name}" if name else arm.name, each.validation)
        for name, cell in cells.items()
        for arm in cell.arms
        for each in arm.finished
    ]
    running: Sequence[tuple[str, list[EvalRecord]]] = [
        (_("{name} (in training)").format(name=each.name), _validations(each.folder))
        for each in course.running
    ]
    curves = [
        (label, [each for each in records if each.fraction > 0]) for label, records in [*ended, *running]
    ]
    return figures.draw_so_far([(label, records) for label, records in curves if records])
