"""The tables of a report, as text: arms, generated text, memorisation, runs, samples."""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iterbatch.errors import RunError
from iterbatch.language import N_, _
from iterbatch.records import layout
from iterbatch.records.read import Samples, read_samples
from iterbatch.records.result import DECODINGS, ArmResult
from iterbatch.report.comparison import CellScores, Comparison
from iterbatch.report.scores import ArmScores, SeedScores
from iterbatch.report.wording import (
    cell_text,
    interval_of,
    interval_words,
    mean,
    number,
    p_words,
    share_words,
    spread,
)
from iterbatch.strategy import REFERENCE

SAMPLES = 4  # prompts shown side by side
TEXT = {  # metric of generated text to its name and how to read it
    "distinct_1": ("distinct-1", N_("different tokens over all tokens; higher is more varied")),
    "distinct_2": ("distinct-2", N_("the same for pairs")),
    "distinct_3": ("distinct-3", N_("the same for triples")),
    "rep_4": ("rep-4", N_("share of repeated runs of four tokens within a text; lower is better")),
    "self_bleu": ("self-BLEU", N_("how much texts resemble each other, 0 to 100; lower is more varied")),
    "mauve": ("MAUVE", N_("how near the texts are to the human continuations, 0 to 1; higher is better")),
    "mean_length": (N_("length"), N_("mean tokens a text, of at most 60")),
}
OUTCOME = {  # column of the first table of arms to how it is headed
    "test": N_("test perplexity"),
    "delta": N_("Δ log perplexity to the baseline, 95%"),
    "p": "p",
    "passes": N_("passes a batch"),
    "ratio": N_("compute, × baseline"),
    "seconds": N_("training seconds"),
    "fresh": N_("fresh tokens"),
}
MORE = {  # of the second
    "seeds": N_("seeds"),
    "validation": N_("validation perplexity"),
    "improvement": N_("probability of improvement"),
    "worth": N_("compute worth"),
    "target": N_("FLOPs to target"),
    "luck": N_("luck of the rate"),
    "updates": N_("updates"),
    "trained": N_("trained tokens"),
    "gflops": "GFLOPs",
}
MEMORY = {
    "train": N_("loss on trained text"),
    "gap": N_("validation − train"),
    "most_passes": N_("passes, most"),
    "most": N_("fall there"),
    "least_passes": N_("passes, least"),
    "least": N_("fall there"),
    "difference": N_("most − least"),
}
RUNS = {  # of the table of runs: how a column is headed, its figure, and digits
    N_("validation perplexity"): (lambda result: result.val_ppl, 3),
    N_("test perplexity"): (lambda result: result.test_ppl, 3),
    N_("bits a byte"): (lambda result: result.bits_per_byte, 4),
    N_("passes a batch"): (lambda result: result.mean_repeats, 2),
    N_("batches"): (lambda result: result.batches, 0),
    N_("updates"): (lambda result: result.updates, 0),
    N_("fresh tokens"): (lambda result: result.tokens_unique, 0),
    N_("trained tokens"): (lambda result: result.tokens_trained, 0),
    "GFLOPs": (lambda result: result.flops / 1e9, 0),
    N_("seconds"): (lambda result: result.train_seconds, 1),
    N_("peak memory, MB"): (lambda result: result.peak_memory_mb, 0),
    N_("skipped updates"): (lambda result: result.skipped_updates, 0),
}
RECORDS = (layout.RESULT, layout.BATCHES, layout.EVALS, layout.DOCUMENTS)  # that a run's row leads to


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    failed: str | None
    cells: list[str]  # as RUNS heads them
    link: str  # to its folder, from the report's
    files: list[str]  # of RECORDS, those that are there


def arm_rows(cell: CellScores) -> list[dict[str, str]]:
    """A row an arm: its name under "arm", the verdict on it, and all of OUTCOME and MORE."""
    compared = {each.arm: each for each in cell.against_baseline}
    return [_arm_row(cell, arm, compared.get(arm.name)) for arm in cell.arms]


def _arm_row(cell: CellScores, arm: ArmScores, compared: Comparison | None) -> dict[str, str]:
    worth = cell.worth(arm.name)
    row = {
        "arm": arm.name,
        "verdict": "" if compared is None else compared.verdict,
        "test": spread(arm.values(lambda result: result.test_ppl)) if not arm.failures else "∞",
        "validation": spread(arm.values(lambda result: result.val_ppl)) if not arm.failures else "∞",
        "passes": number(arm.mean(lambda result: result.mean_repeats), 2),
        "ratio": number(cell.compute_ratio(arm.name), 2),
        "seconds": number(arm.mean(lambda result: result.train_seconds), 1),
        "fresh": number(arm.mean(lambda result: result.tokens_unique), 0),
        "seeds": f"{len(arm.finished)}"
        + (_(" (+{count} failed)").format(count=len(arm.failures)) if arm.failures else ""),
        "worth": "" if arm.name == REFERENCE or worth is None else interval_of(worth),
        "target": "" if arm.name == REFERENCE else _to_target(cell, arm),
        "updates": number(arm.mean(lambda result: result.updates), 0),
        "trained": number(arm.mean(lambda result: result.tokens_trained), 0),
        "gflops": number(arm.mean(lambda result: result.flops) / 1e9, 0),
    }
    if compared is None:
        return row | dict.fromkeys(("delta", "p", "improvement", "luck"), "")
    return row | {
        "delta": interval_words(compared),
        "p": "" if compared.interval is None else p_words(compared.p_adjusted),
        "improvement": number(compared.improvement, 2),
        "luck": number(compared.luck, 4),
    }


def _to_target(cell: CellScores, arm: ArmScores) -> str:
    interval, reached, of = cell.to_target(arm.name)
    return (
        share_words(interval)
        if reached == of and interval.estimate > 0
        else _("reached by {reached} of {of}").format(reached=reached, of=of)
    )


def shown(columns: Mapping[str, str], rows: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The columns in which any row has something."""
    kept = list(rows)
    return {
        name: _(head)
        for name, head in columns.items()
        if any(row.get(name, "") not in ("", "-") for row in kept)
    }


def text_rows(cell: CellScores) -> list[dict[str, str]]:
    """A row an arm and decoding of what arms wrote."""
    return [
        {"arm": arm.name, "decoding": how, **{metric: number(mean(arm.text(how, metric))) for metric in TEXT}}
        for arm in cell.arms
        if arm.finished
        for how in DECODINGS
    ]


def memory_rows(cell: CellScores) -> list[dict[str, str]]:
    """A row an arm of what it learnt by heart."""
    return [_memory_row(arm) for arm in cell.arms if arm.finished]


def _memory_row(arm: ArmScores) -> dict[str, str]:
    def group(name: str, value: str) -> float:
        return arm.mean(lambda result: getattr((result.memorised or {}).get(name), value, None))

    def fall(name: str) -> float:
        return group(name, "loss") - group(name, "base_loss")

    losses = [math.log(value) for value in arm.values(lambda result: result.val_ppl)]
    return {
        "arm": arm.name,
        "train": number(group("all", "loss")),
        "gap": number(mean(losses) - group("all", "loss")),
        "most_passes": number(group("most", "passes"), 1),
        "most": number(fall("most")),
        "least_passes": number(group("least", "passes"), 1),
        "least": number(fall("least")),
        "difference": number(fall("most") - fall("least")),
    }


def runs(cell: CellScores, folder: Path) -> list[Run]:
    """A row for each arm and seed, with links from a folder."""
    return [_run(arm, each, folder) for arm in cell.arms for each in arm.seeds]


def _run(arm: ArmScores, each: SeedScores, folder: Path) -> Run:
    cells = [
        "-" if each.result is None else number(value(each.result), digits) for value, digits in RUNS.values()
    ]
    files = [name for name in RECORDS if (each.folder / name).exists()]
    return Run(arm.name, each.seed, each.failed, cells, f"{link(each.folder, folder)}/", files)


def link(to: Path, folder: Path) -> str:
    """From a page in one folder to another folder."""
    try:
        return "/".join(quote(part) for part in Path(os.path.relpath(to, folder)).parts)
    except ValueError:  # on another drive
        return to.resolve().as_uri()


def samples(cell: CellScores) -> list[dict[str, Any]]:
    """For the first prompts, what the base and each arm's first seed wrote."""
    found = {arm.name: _samples_of(arm.finished[0]) for arm in cell.arms if arm.finished}
    there = {name: samples for name, samples in found.items() if samples is not None}
    if not there:
        return []
    first = next(iter(there.values()))
    columns = {_("before training"): first.base, **{name: samples.trained for name, samples in there.items()}}
    return [
        {
            "prompt": prompt,
            "texts": [
                (name, texts["sampled"][at]) for name, texts in columns.items() if at < len(texts["sampled"])
            ],
        }
        for at, prompt in enumerate(first.prompts[:SAMPLES])
    ]


def _samples_of(scores: SeedScores) -> Samples | None:
    try:
        return read_samples(scores.folder)
    except RunError:
        return None


# ------------------------------------------------------------------------------------------------------------
# For other programs


def metrics_csv(cells: Mapping[str, CellScores]) -> str:
    """One line for each arm and seed, every figure of its result that is one number."""
    lines = [
        {
            "cell": name,
            "arm": arm.name,
            "seed": each.seed,
            "failed": each.failed is not None,
            **_numbers(each.result),
        }
        for name, cell in cells.items()
        for arm in cell.arms
        for each in arm.seeds
    ]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writerow({column: cell_text(column) for column in columns})
    writer.writerows({column: cell_text(value) for column, value in line.items()} for line in lines)
    return buffer.getvalue()


def _numbers(result: ArmResult | None) -> dict[str, float]:
    return {} if result is None else dict(_flat(dataclasses.asdict(result)))


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and key != "seed" and math.isfinite(value):
            yield f"{prefix}{key}", value


LIVE_IN_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "∞": r"$\infty$",
    "Δ": r"$\Delta$",
    "<": "$<$",
    ">": "$>$",
} | {mark: f"\\{mark}" for mark in "&%$#_{}"}


def tex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(LIVE_IN_TEX.get(letter, letter) for letter in text)


def tex_tables(cells: Mapping[str, CellScores]) -> str:
    """The first table of arms of every cell for a paper; needs the package booktabs."""
    return "\n".join(_tex_table(name, cell) for name, cell in cells.items())


def _tex_table(name: str, cell: CellScores) -> str:
    rows = arm_rows(cell)
    columns = shown(OUTCOME, rows)
    caption = f"{name}. " if name else ""
    caption += _("Mean ± standard deviation over seeds; 95% intervals; p-values after Holm's correction.")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(map(tex, [_("arm"), *columns.values()])) + r" \\",
        r"\midrule",
        *(" & ".join(map(tex, [row["arm"], *(row[name] for name in columns)])) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)
