"""The losses of the untrained base on a cell's training blocks, and what they cost."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from iterbatch.records import layout, seal
from iterbatch.records.write import write_json


@dataclass(frozen=True)
class BaseTable:
    """Made once for all arms and seeds of a cell."""

    nats: list[float]  # of each training block
    flops: float
    seconds: float


def write_base_table(folder: Path, table: BaseTable) -> None:
    """Write it into the folder of its cell."""
    write_json(folder / layout.BASE_LOSSES, seal.sealed(asdict(table)))


def read_base_table(folder: Path) -> BaseTable | None:
    """The table of a cell; None where it has none, or a damaged one, which is made anew."""
    try:
        content = json.loads((folder / layout.BASE_LOSSES).read_text(encoding="utf-8"))
        seal.check(content)
        nats = [float(value) for value in content["nats"]]
        table = BaseTable(nats, float(content["flops"]), float(content["seconds"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return table if all(map(math.isfinite, [*nats, table.flops, table.seconds])) else None
