"""Words for numbers, and text made inert."""

import html
import math
import re
import statistics
from collections.abc import Sequence

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


def percent(comparison: Comparison) -> str:
    """What a difference of log perplexity means for perplexity."""
    return f"{(math.exp(comparison.estimate) - 1) * 100:+.1f}%"


def code(text: str) -> list[str]:
    """An indented code block: Markdown and HTML in it stay text."""
    return [f"    {line}" for line in plain(text).splitlines() or [""]]


def markdown(text: str) -> str:
    """A name as Markdown that shows it and does nothing else: no HTML, no links, no table cells."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(plain(text).replace("\n", " ")))


def cell_text(value: object) -> object:
    """A value for a table that a spreadsheet may open: text is text there, never a formula."""
    if not isinstance(value, str):
        return value
    inert = plain(value).replace("\n", " ")
    return f"'{inert}" if re.match(r"\s*[=+\-@]", inert) else inert


def plain(text: str) -> str:
    """Text without control characters (but for line breaks), so that it is inert in a terminal too."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", text)
