"""What a comparison says in plain words: a sentence, then a question a row, then what to keep in mind."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iterbatch.report.comparison import CellScores, Comparison
from iterbatch.report.wording import interval_words, p_words, percent_words, signed
from iterbatch.strategy import REFERENCE


@dataclass(frozen=True)
class Answer:
    """A question of the report, answered."""

    question: str
    arm: str  # whose claim it is
    rival: str  # that it must beat
    verdict: str  # of the comparison, in its own words
    words: str  # the answer
    difference: str  # nats a token with its interval; empty where there is none
    p: str  # after Holm's correction


def conclusion(cell: CellScores) -> str:
    """What the comparison says, in one sentence; what it leaves out comes before."""
    return "".join(f"{each} " for each in _unpaired(cell)) + _conclusion(cell)


def _conclusion(cell: CellScores) -> str:
    if cell.open:
        return unfinished(cell.open)
    if cell.arm(REFERENCE) is None:
        return f"There is no arm '{REFERENCE}' to compare with: the table of arms stands alone."
    found = [each for each in cell.against_baseline if math.isfinite(each.estimate)]
    if not found:
        return _nothing(cell)
    best = min(found, key=lambda each: each.estimate)
    opening = f"For {_budget(cell)}, "
    if best.interval is None:
        return f"{opening}{_ended(best)}; with one seed this may be chance."
    return f"{opening}{_best(best, found)}{_best_repeating(cell, best, found)}"


def _best(best: Comparison, found: Sequence[Comparison]) -> str:
    """How the best arm stands, and who else."""
    better, worse = ([each.arm for each in found if each.verdict == word] for word in ("better", "worse"))
    if best.verdict == "better":
        others = [arm for arm in better if arm != best.arm]
        also = f" {_listed(others)} ended lower, too." if others else ""
        return f"{_ended(best)} ({_sure(best)}).{also}"
    if len(worse) == len(found):
        arms = "every other arm ended" if len(found) > 1 else f"{best.arm} ended"
        nearest = f", the nearest, {best.arm}, by {percent_words(best.estimate)[0]}" if len(found) > 1 else ""
        by = nearest or f" by {percent_words(best.estimate)[0]}"
        return f"{arms} with a higher test perplexity than the baseline{by} ({_sure(best)})."
    return f"no arm beat the baseline beyond chance: the nearest, {_ended(best)} ({_sure(best)})."


def _best_repeating(cell: CellScores, best: Comparison, found: Sequence[Comparison]) -> str:
    """The best of the arms that repeat batches, where the best of all does not."""
    repeating = [each for each in found if _repeats(cell, each.arm)]
    if not repeating or best in repeating:
        return ""
    first = min(repeating, key=lambda each: each.estimate)
    size, way = percent_words(first.estimate)
    chance = "" if first.verdict in ("better", "worse") else ", which may be chance"
    return f" Of the arms that repeat batches {first.arm} did best: {size} {way}{chance}."


def _repeats(cell: CellScores, name: str) -> bool:
    arm = cell.arm(name)
    return arm is not None and arm.mean(lambda result: result.flops_repeat) > 0


def over_all(cells: Mapping[str, CellScores]) -> str:
    """What several comparisons say together, in one sentence."""
    verdicts = {name: {each.verdict for each in cell.against_baseline} for name, cell in cells.items()}
    better = [name for name, found in verdicts.items() if "better" in found]
    only_worse = [name for name, found in verdicts.items() if found == {"worse"}]
    if len(better) == len(cells):
        return f"In each of {len(cells)} comparisons an arm ended better than the baseline beyond chance."
    found = (
        f"in {len(better)} of {len(cells)} comparisons ({_listed(better)})"
        if better
        else f"in none of {len(cells)} comparisons"
    )
    worse = f"; in {len(only_worse)} every other arm ended worse" if only_worse else ""
    return f"{found[0].upper()}{found[1:]} an arm ended better than the baseline beyond chance{worse}."


def _nothing(cell: CellScores) -> str:
    failed = [str(each.seed) for arm in cell.arms if arm.name == REFERENCE for each in arm.failures]
    if failed:
        return f"There is nothing to compare: the baseline failed with seed {', '.join(failed)}."
    return "There is nothing to compare: no other arm has finished a seed that the baseline has finished."


def _budget(cell: CellScores) -> str:
    """What all arms had the same of, and what the dearest cost where that was not compute."""
    if cell.unit == "flops":
        return "the same compute"
    ratio = max((cell.compute_ratio(arm.name) for arm in cell.compared), default=math.nan)
    more = f" but up to {ratio:.2f} times the compute" if ratio > 1.02 else ""
    return f"the same {cell.unit}{more}"


def _ended(each: Comparison) -> str:
    size, way = percent_words(each.estimate)
    return f"{each.arm} ended with {size} {way} test perplexity than the baseline"


def _sure(each: Comparison) -> str:
    """The interval in per cent, the p-value, and of how many seeds."""
    assert each.interval is not None
    low, high = percent_words(each.interval.low), percent_words(each.interval.high)
    interval = (
        f"{low[0]} to {high[0]} {high[1]}" if low[1] == high[1] else f"{' '.join(low)} to {' '.join(high)}"
    )
    if low[1] == high[1] == "lower":  # the smaller change first
        interval = f"{high[0]} to {low[0]} lower"
    return f"95% interval {interval}; p {p_words(each.p_adjusted, '= ')}; {len(each.seeds)} seeds"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def unfinished(pairs: Sequence[tuple[str, int]]) -> str:
    """What to say first while pairs of arm and seed are still to be trained."""
    named = ", ".join(f"{arm} with seed {seed}" for arm, seed in pairs[:3])
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return f"Unfinished, no verdict yet: {named}{more} still to be trained. The numbers are those so far."


# ------------------------------------------------------------------------------------------------------------
# Questions

WORDS = {
    "better": "Yes",
    "worse": "No, the other way round",
    "no difference found": "No difference found",
    "no interval": "Not decided: fewer than two seeds",
    "trained alike": "Not tested: {arm} and {rival} trained alike, to the last digit",
    "reference failed": "{rival} failed with a seed that {arm} finished",
    "failed": "{arm} failed with a seed that {rival} finished",
    "unfinished": "Not decided: pairs are still to be trained",
}


def answers(cell: CellScores) -> list[Answer]:
    """The questions that the arms of a comparison ask, each with its answer."""
    return [answer(question, each) for question, each in cell.questions]


def answer(question: str, each: Comparison) -> Answer:
    """One of them."""
    words = WORDS[each.verdict].format(arm=each.arm, rival=each.reference)
    told = each.verdict not in ("trained alike", "failed", "reference failed")
    return Answer(
        question,
        each.arm,
        each.reference,
        each.verdict,
        words,
        interval_words(each) if told else "",
        p_words(each.p_adjusted) if told else "",
    )


def answer_line(each: Answer) -> str:
    """An answer in one line, for a terminal."""
    p = f", p {each.p}" if each.p.startswith("<") else f", p = {each.p}"
    size = f": {each.arm} - {each.rival} {each.difference} nats a token{p if each.p not in ('', '-') else ''}"
    return f"{each.question} {each.words}{size if each.difference else ''}."


# ------------------------------------------------------------------------------------------------------------
# What to keep in mind


def cautions(cell: CellScores) -> list[str]:
    """What the reader of a comparison must know to read it right, a sentence each."""
    return [*_alike(cell), *_compute(cell), *_few(cell), *_luck(cell), *_failed(cell)]


def _unpaired(cell: CellScores) -> list[str]:
    left = ", ".join(f"{arm} with seed {seed}" for arm, seed in cell.unpaired)
    why = "scored on other documents than the baseline, or document by document not at all"
    return [f"Left out of every comparison: {left}, {why}."] if left else []


def _alike(cell: CellScores) -> list[str]:
    return [arm.alike for arm in cell.arms if arm.alike]


def _compute(cell: CellScores) -> list[str]:
    if not any(cell.compute_ratio(arm.name) >= 1.02 for arm in cell.compared):
        return []
    said = "The arms spent different amounts of compute: a lower perplexity is no proof that repeating pays"
    advice = "" if cell.unit == "flops" else "; with --match flops every arm costs what the baseline costs"
    return [f"{said}{advice}."]


def _few(cell: CellScores) -> list[str]:
    return [f"Caution: {said}." for split, text in cell.scored.items() if (said := text.caution(split))]


def _luck(cell: CellScores) -> list[str]:
    known = [each.luck for each in cell.against_baseline if not math.isnan(each.luck)]
    if not known:
        return []
    return [
        f"The choice of learning rates alone could move these differences by ± {min(known):.4f} to "
        f"{max(known):.4f} nats a token (standard error, by the tuning seeds); the intervals allow for it."
    ]


def _failed(cell: CellScores) -> list[str]:
    failed = [f"{arm.name}, seed {each.seed}: {each.failed}" for arm in cell.arms for each in arm.failures]
    return [f"Failed, and scored as infinity: {'; '.join(failed)}."] if failed else []


def glance(estimate: float, verdict: str) -> str:
    """A difference where there is room for a number only."""
    return f"{signed(estimate)}{'*' if verdict in ('better', 'worse') else ''}"
