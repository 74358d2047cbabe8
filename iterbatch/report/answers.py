"""What a comparison says, a sentence each; it comes first."""

import math
import statistics
from collections.abc import Sequence

from iterbatch.report.comparison import CellScores, Comparison
from iterbatch.report.wording import interval_of, interval_words, mean, number, percent, share_words
from iterbatch.strategy import REFERENCE


def answers(cell: CellScores) -> list[str]:
    """What the comparison says, a sentence each.

    Which arm is best at this budget, what reaching the baseline takes, what controls leave of it.
    """
    if cell.open:
        return [unfinished(cell.open)]
    if cell.arm(REFERENCE) is None:
        return [f"There is no arm '{REFERENCE}' to compare with; the table below stands alone."]
    said = [
        *_unpaired_words(cell),
        *_best(cell),
        *_luck_words(cell),
        *_alike_words(cell),
        *_worth_words(cell),
        _target_words(cell),
    ]
    said += [f"{question} {verdict_words(each)}" for question, each in cell.questions]
    return [*said, *_text_words(cell)]


def unfinished(pairs: Sequence[tuple[str, int]]) -> str:
    """What to say first while pairs of arm and seed are still to be trained."""
    named = ", ".join(f"{arm} with seed {seed}" for arm, seed in pairs[:3])
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return f"Unfinished, no verdict yet: {named}{more} still to be trained. The numbers are those so far."


def _unpaired_words(cell: CellScores) -> list[str]:
    left = ", ".join(f"{arm} with seed {seed}" for arm, seed in cell.unpaired)
    why = "scored on other documents than the baseline, or document by document not at all"
    return [f"Left out of every comparison: {left}, {why}."] if left else []


def _best(cell: CellScores) -> list[str]:
    unit = "FLOPs" if cell.unit == "flops" else cell.unit
    budget = "the same epochs, at different cost" if unit == "epochs" else f"the same {unit}"
    found = [each for each in cell.against_baseline if math.isfinite(each.estimate)]
    if not found:
        failed = [str(each.seed) for arm in cell.arms if arm.name == REFERENCE for each in arm.failures]
        why = (
            f"the baseline failed with seed {', '.join(failed)}"
            if failed
            else "no other arm has finished a seed that the baseline has finished"
        )
        return [f"There is nothing to compare: {why}."]
    best = min(found, key=lambda each: each.estimate)
    size = f"{interval_words(best)} nats a token against the baseline ({percent(best)})"
    if best.estimate >= 0:
        none = "no arm has a lower test perplexity than the baseline"
        said = f"For {budget}, {none}; nearest is {best.arm}, {size}."
    else:
        said = f"For {budget}, {best.arm} has the lowest test perplexity: {size}"
        said += {
            "no interval": "; with fewer than two seeds there is no interval, and this may be chance.",
            "better": f"; p = {best.p_adjusted:.3f} after Holm's correction.",
        }.get(best.verdict, f", which may be chance (p = {best.p_adjusted:.3f} after Holm's correction).")
    for verdict in ("better", "worse"):
        arms = [
            each.arm
            for each in found
            if each.verdict == verdict and (each.arm != best.arm or verdict == "worse")
        ]
        said += f" {verdict.capitalize()} than the baseline beyond chance: {', '.join(arms)}." if arms else ""
    return [said]


def _target_words(cell: CellScores) -> str:
    reached_by, missed_by = [], []
    for arm in cell.compared:
        interval, reached, of = cell.to_target(arm.name)
        if reached < of or not of:
            missed_by.append(f"{arm.name} ({reached} of {of})")
        else:
            reached_by.append(f"{arm.name} {share_words(interval)}")
    missed = [f"not reached with every seed: {', '.join(missed_by)}"] if missed_by else []
    found = "; ".join([*reached_by, *missed])
    return (
        "FLOPs to reach the final validation perplexity of its own baseline, the one of the same seed, as a "
        f"share of that baseline's: {found or 'no other arm'}. A curve that is nearly flat at its end makes "
        "much of little here."
    )


def _worth_words(cell: CellScores) -> list[str]:
    found = [(arm.name, cell.worth(arm.name)) for arm in cell.compared]
    said = [f"{name} {interval_of(worth)}" for name, worth in found if worth is not None]
    if cell.exchange is None or not said:
        return []
    shares = ", ".join(f"{share:g}" for share in cell.exchange[0])
    return [
        "Compute worth: what the baseline would have needed to end where the arm did, over what the arm "
        f"spent, read off baselines that decayed at {shares} of the budget: {'; '.join(said)}. "
        "Above 1 the arm pays."
    ]


def _alike_words(cell: CellScores) -> list[str]:
    return [arm.alike for arm in cell.arms if arm.alike]


def _luck_words(cell: CellScores) -> list[str]:
    known = [each.luck for each in cell.against_baseline if not math.isnan(each.luck)]
    if not known:
        return []
    return [
        f"The choice of learning rates alone could move these differences by ± {min(known):.4f} to "
        f"{max(known):.4f} nats a token (standard error, by the tuning seeds); the intervals allow for it."
    ]


def verdict_words(each: Comparison) -> str:
    """What a control leaves of a claim."""
    what = f"{each.arm} minus {each.reference}: {interval_words(each)} nats a token"
    words = {
        "better": f"Yes: {what}, p = {each.p_adjusted:.3f}.",
        "worse": f"No, the other way round: {what}, p = {each.p_adjusted:.3f}.",
        "no difference found": f"No difference found: {what}, p = {each.p_adjusted:.3f}.",
        "no interval": f"Not decided, fewer than two seeds: {what}.",
        "trained alike": f"Not tested: {each.arm} and {each.reference} trained alike, to the last digit.",
        "reference failed": f"{each.reference} failed with a seed that {each.arm} finished.",
        "failed": f"{each.arm} failed with a seed that {each.reference} finished.",
        "unfinished": f"Not decided, pairs are still to be trained: {what}.",
    }
    return words[each.verdict]


def _text_words(cell: CellScores) -> list[str]:
    baseline = cell.arm(REFERENCE)
    compared = [arm for arm in cell.compared if arm.finished]
    if baseline is None or not baseline.finished or not compared:
        return []
    rep, varied = (
        {arm.name: mean(arm.text("sampled", metric)) for arm in [baseline, *compared]}
        for metric in ("rep_4", "distinct_2")
    )
    within = [
        statistics.variance(values)
        for arm in cell.arms
        if len(values := arm.text("sampled", "distinct_2")) > 1
    ]
    noise = ""
    if within:
        noise = f", where seeds of one arm spread by {number(math.sqrt(statistics.fmean(within)))}"
    others = [name for name in rep if name != REFERENCE]
    least, most = (choose(others, key=lambda name: varied[name]) for choose in (min, max))
    low, high = (choose(rep[name] for name in others) for choose in (min, max))
    return [
        f"Sampled text: distinct-2 is {number(varied[REFERENCE])} for the baseline, and "
        f"{number(varied[least])} ({least}) to "
        f"{number(varied[most])} ({most}) for the others{noise}; "
        f"rep-4 is {number(rep[REFERENCE])}, "
        f"and {number(low)} to {number(high)} for the others."
    ]
