"""Words for numbers, and text made inert."""

import math
import re
import statistics
from collections.abc import Sequence

from iterbatch.language import _
from iterbatch.report.comparison import Comparison
from iterbatch.report.stats import Interval


def number(value: float, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    if math.isnan(value):
        return "-"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "∞"


def signed(value: float) -> str:
    """A difference of log perplexity."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return "-" if math.isnan(value) else f"{value:+.4f}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, with the standard deviation where there are several."""
    if not values:
        return "-"
    more = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{more}"


def mean(values: Sequence[float]) -> float:
    """Their mean; NaN where there is none."""
    return statistics.fmean(values) if values else math.nan


def interval_words(comparison: Comparison) -> str:
    """An estimate with its interval, as text."""
    if comparison.interval is None:
        return signed(comparison.estimate)
    low, high = signed(comparison.interval.low), signed(comparison.interval.high)
    return f"{signed(comparison.estimate)} [{low}, {high}]"


def interval_of(ratio: Interval) -> str:
    """A ratio with its interval, where it has one."""
    between = "" if math.isnan(ratio.low) else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{ratio.estimate:.2f}{between}"


def share_words(speed_up: Interval) -> str:
    """How much less, as a share of what is spent otherwise, with its interval."""
    return interval_of(
        Interval(1 / speed_up.estimate, 1 / speed_up.high, 1 / speed_up.low, speed_up.p, speed_up.method)
    )


def percent_words(estimate: float) -> tuple[str, str]:
    """What a difference of log perplexity means for perplexity: how many per cent, and lower or higher."""
    change = math.expm1(min(estimate, 700.0)) * 100
    return f"{abs(change):.1f}%", _("lower") if change < 0 else _("higher")


def p_words(p: float, before: str = "") -> str:
    """A p-value, never rounded to zero; a dash where there is none.

    Args:
        p: From 0 to 1.
        before: What comes before a number that needs no "<".
    """
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{before}{p:.3f}"


def code(text: str) -> list[str]:
    """An indented code block: Markdown and HTML in it stay text."""
    return [f"    {line}" for line in plain(text).splitlines() or [""]]


# What Markdown would take for more than text: HTML and entities, marks, table cells, addresses, what opens a
# line. Underscores and signs within words and numbers are left as they are.
LIVE = re.compile(
    r"[\\`*|~]|\](?=\s?[(\[:])|(?<!\w)_|_(?!\w)|(?<=\w):(?=//)|(?<=\bwww)\.|"
    r"^\s*(?:[#>+-](?![\d.])|=+$|\d+(?=[.)]))",
    flags=re.IGNORECASE,
)


def markdown(text: str) -> str:
    """A name as Markdown that shows it and does nothing else: no HTML, no links, no table cells."""
    safe = LIVE.sub(_escaped, plain(text).replace("\n", " "))
    return re.sub(r"<(?=[a-z/!?])", "&lt;", re.sub(r"&(?=#|\w+;)", "&amp;", safe), flags=re.IGNORECASE)


def _escaped(match: re.Match[str]) -> str:
    found = match[0]
    return f"{found}\\" if found[-1].isdigit() else f"{found[:-1]}\\{found[-1]}"


def cell_text(value: object) -> object:
    """A value for a table that a spreadsheet may open: text is text there, never a formula."""
    if not isinstance(value, str):
        return value
    inert = plain(value).replace("\n", " ")
    return f"'{inert}" if re.match(r"\s*[=+\-@]", inert) else inert


def plain(text: str) -> str:
    """Text without control characters (but for line breaks), so that it is inert in a terminal too."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", text)
