"""What a comparison says in plain words: a sentence, then a question a row, then what to keep in mind."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iterbatch.language import N_, _
from iterbatch.report.comparison import CellScores, Comparison
from iterbatch.report.wording import interval_words, p_words, percent_words, signed
from iterbatch.strategy import REFERENCE

MOST = 700.0  # nats a token, above which e to the power is more than a float holds


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
        return _("There is no arm '{reference}' to compare with: the table of arms stands alone.").format(
            reference=REFERENCE
        )
    found = [each for each in cell.against_baseline if math.isfinite(each.estimate)]
    if not found:
        return _nothing(cell)
    beyond = [each for each in found if each.verdict == "better"]
    best = min(beyond or found, key=lambda each: each.estimate)
    if best.estimate == 0 and (best.interval is None or best.verdict == "trained alike"):
        said = _("{arm} trained as the baseline did, to the last digit.").format(arm=best.arm)
    elif best.interval is None:
        said = _("{ended}; with one seed this may be chance.").format(ended=_ended(best))
    else:
        said = f"{_best(best, found)}{_best_repeating(cell, best, found)}"
    return _("For {budget}, {said}").format(budget=_budget(cell), said=said)


def _best(best: Comparison, found: Sequence[Comparison]) -> str:
    """How the best arm stands, and who else."""
    better, worse = ([each.arm for each in found if each.verdict == word] for word in ("better", "worse"))
    if best.verdict == "better":
        others = [arm for arm in better if arm != best.arm]
        also = _(" {listed} ended lower, too.").format(listed=_listed(others)) if others else ""
        return _("{ended} ({sure}).{more}").format(ended=_ended(best), sure=_sure(best), more=also)
    if len(worse) == len(found) > 1:
        return _(
            "every other arm ended with a higher test perplexity than the baseline; the nearest, {ended} "
            "({sure})."
        ).format(ended=_ended(best), sure=_sure(best))
    if len(worse) == len(found):
        return _("{ended} ({sure}).{more}").format(ended=_ended(best), sure=_sure(best), more="")
    return _("no arm beat the baseline beyond chance: the nearest, {ended} ({sure}).").format(
        ended=_ended(best), sure=_sure(best)
    )


def _best_repeating(cell: CellScores, best: Comparison, found: Sequence[Comparison]) -> str:
    """The best of the arms that repeat batches, where the best of all does not."""
    repeating = [each for each in found if _repeats(cell, each.arm)]
    if not repeating or best in repeating:
        return ""
    first = min(repeating, key=lambda each: each.estimate)
    size, way = percent_words(first.estimate)
    chance = "" if first.verdict in ("better", "worse") else _(", which may be chance")
    return _(" Of the arms that repeat batches {arm} did best: {size} {way}{chance}.").format(
        arm=first.arm, size=size, way=way, chance=chance
    )


def _repeats(cell: CellScores, name: str) -> bool:
    arm = cell.arm(name)
    return arm is not None and arm.mean(lambda result: result.flops_repeat) > 0


def over_all(cells: Mapping[str, CellScores]) -> str:
    """What several comparisons say together, in one sentence; empty while pairs are still to be trained."""
    if any(cell.open for cell in cells.values()):
        return ""
    verdicts = {name: {each.verdict for each in cell.against_baseline} for name, cell in cells.items()}
    better = [name for name, found in verdicts.items() if "better" in found]
    only_worse = [name for name, found in verdicts.items() if found == {"worse"}]
    if len(better) == len(cells):
        return _(
            "In each of {count} comparisons an arm ended better than the baseline beyond chance."
        ).format(count=len(cells))
    found = (
        _("in {count} of {count2} comparisons ({listed})").format(
            count=len(better), count2=len(cells), listed=_listed(better)
        )
        if better
        else _("in none of {count} comparisons").format(count=len(cells))
    )
    worse = _("; in {count} every other arm ended worse").format(count=len(only_worse)) if only_worse else ""
    return _("{upper}{found} an arm ended better than the baseline beyond chance{worse}.").format(
        upper=found[0].upper(), found=found[1:], worse=worse
    )


def _nothing(cell: CellScores) -> str:
    failed = [str(each.seed) for arm in cell.arms if arm.name == REFERENCE for each in arm.failures]
    if failed:
        return _("There is nothing to compare: the baseline failed with seed {names}.").format(
            names=", ".join(failed)
        )
    if cell.against_baseline:
        return _(
            "There is nothing to compare: every other arm failed with a seed that the baseline finished."
        )
    return _("There is nothing to compare: no other arm has finished a seed that the baseline has finished.")


def _budget(cell: CellScores) -> str:
    """What all arms had the same of, and what the dearest cost where that was not compute."""
    if cell.unit == "flops":
        return _("the same compute")
    ratio = max((cell.compute_ratio(arm.name) for arm in cell.compared), default=math.nan)
    more = _(" but up to {ratio:.2f} times the compute").format(ratio=ratio) if ratio > 1.02 else ""
    return _("the same {unit}{more}").format(unit=cell.unit, more=more)


def _ended(each: Comparison) -> str:
    size = percent_words(each.estimate)[0]
    if each.estimate < 0:
        return _("{arm} ended with {size} lower test perplexity than the baseline").format(
            arm=each.arm, size=size
        )
    return _("{arm} ended with {size} higher test perplexity than the baseline").format(
        arm=each.arm, size=size
    )


def _sure(each: Comparison) -> str:
    """The interval in per cent, the p-value, and of how many seeds."""
    assert each.interval is not None
    low, high = (100 * math.expm1(min(end, MOST)) for end in (each.interval.low, each.interval.high))
    if high < 0:
        interval = _("{small:.1f}% to {large:.1f}% lower").format(small=-high, large=-low)
    elif low > 0:
        interval = _("{small:.1f}% to {large:.1f}% higher").format(small=low, large=high)
    else:
        interval = _("{lower:.1f}% lower to {higher:.1f}% higher").format(lower=abs(low), higher=high)
    p = p_words(each.p_adjusted, "= ")
    return _("95% interval {interval}; p {p}; {seeds} seeds").format(
        interval=interval, p=p, seeds=len(each.seeds)
    )


def _listed(names: Sequence[str]) -> str:
    return (
        names[0]
        if len(names) == 1
        else _("{first} and {last}").format(first=", ".join(names[:-1]), last=names[-1])
    )


def unfinished(pairs: Sequence[tuple[str, int]]) -> str:
    """What to say first while pairs of arm and seed are still to be trained."""
    named = ", ".join(_("{arm} with seed {seed}").format(arm=arm, seed=seed) for arm, seed in pairs[:3])
    more = _(" and {count} more").format(count=len(pairs) - 3) if len(pairs) > 3 else ""
    return _(
        "Unfinished, no verdict yet: {named}{more} still to be trained. The numbers are those so far."
    ).format(named=named, more=more)


# ------------------------------------------------------------------------------------------------------------
# Questions

WORDS = {
    "better": N_("Yes"),
    "worse": N_("No, the other way round"),
    "no difference found": N_("No difference found"),
    "no interval": N_("Not decided: fewer than two seeds"),
    "trained alike": N_("Not tested: {arm} and {rival} trained alike, to the last digit"),
    "reference failed": N_("{rival} failed with a seed that {arm} finished"),
    "failed": N_("{arm} failed with a seed that {rival} finished"),
    "unfinished": N_("Not decided: pairs are still to be trained"),
}


def answers(cell: CellScores) -> list[Answer]:
    """The questions that the arms of a comparison ask, each with its answer."""
    return [answer(question, each) for question, each in cell.questions]


def answer(question: str, each: Comparison) -> Answer:
    """One of them."""
    words = _(WORDS[each.verdict]).format(arm=each.arm, rival=each.reference)
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
    size = _(": {arm} - {rival} {difference} nats a token{p}").format(
        arm=each.arm, rival=each.rival, difference=each.difference, p=p if each.p not in ("", "-") else ""
    )
    return f"{each.question} {each.words}{size if each.difference else ''}."


# ------------------------------------------------------------------------------------------------------------
# What to keep in mind


def cautions(cell: CellScores) -> list[str]:
    """What the reader of a comparison must know to read it right, a sentence each."""
    return [*_alike(cell), *_compute(cell), *_few(cell), *_luck(cell), *_failed(cell)]


def _unpaired(cell: CellScores) -> list[str]:
    left = ", ".join(_("{arm} with seed {seed}").format(arm=arm, seed=seed) for arm, seed in cell.unpaired)
    why = _("scored on other documents than the baseline, or document by document not at all")
    return [_("Left out of every comparison: {left}, {why}.").format(left=left, why=why)] if left else []


def _alike(cell: CellScores) -> list[str]:
    return [arm.alike for arm in cell.arms if arm.alike]


def _compute(cell: CellScores) -> list[str]:
    more = [ratio for arm in cell.compared if (ratio := cell.compute_ratio(arm.name)) >= 1.02]
    if not more:
        return []
    if cell.unit == "flops":
        return [
            _(
                "The arms' compute differs, up to {most:.2f} times the baseline's: a budget ends at the "
                "nearest pass, which is much of a run of few batches. A lower perplexity is no proof that "
                "repeating pays."
            ).format(most=max(more))
        ]
    said = _(
        "The arms spent different amounts of compute: a lower perplexity is no proof that repeating pays"
    )
    advice = _("; with --match flops every arm costs what the baseline costs")
    return [f"{said}{advice}."]


def _few(cell: CellScores) -> list[str]:
    return [f"Caution: {said}." for split, text in cell.scored.items() if (said := text.caution(split))]


def _luck(cell: CellScores) -> list[str]:
    known = [each.luck for each in cell.against_baseline if not math.isnan(each.luck)]
    if not known:
        return []
    return [
        _(
            "The choice of learning rates alone could move these differences by ± {min:.4f} to {max:.4f} "
            "nats a token (standard error, by the tuning seeds); the intervals allow for it."
        ).format(min=min(known), max=max(known))
    ]


def _failed(cell: CellScores) -> list[str]:
    failed = [
        _("{arm}, seed {seed}: {failed}").format(arm=arm.name, seed=each.seed, failed=each.failed)
        for arm in cell.arms
        for each in arm.failures
    ]
    return [_("Failed, and scored as infinity: {names}.").format(names="; ".join(failed))] if failed else []


def glance(estimate: float, verdict: str) -> str:
    """A difference where there is room for a number only."""
    return f"{signed(estimate)}{'*' if verdict in ('better', 'worse') else ''}"
