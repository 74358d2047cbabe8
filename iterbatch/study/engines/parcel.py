"""Files of a study on their way between machines that share no folder: names and bytes, and nothing else.

A name is that of a file below a folder. What else it says is refused, so nothing is written elsewhere.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.write import whole_or_not
from iterbatch.runtime.checkpoint import checkpoint_files

Parcel = Mapping[
    str, bytes
]  # the name of a file, below its folder and with / between its parts, to its content

OF_A_CELL = (layout.MANIFEST, layout.BASE_LOSSES)  # beside its pairs, and the same on every machine
_PART = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+ -]*")  # of a name; it may not begin with a dot


def pack(folder: Path) -> Parcel:
    """All files of a folder, but for hidden ones, as those are that are being written."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()]
    named = {file.relative_to(folder): file for file in files}
    shown = {name: file for name, file in named.items() if not any(part[0] == "." for part in name.parts)}
    return {name.as_posix(): file.read_bytes() for name, file in shown.items()}


def pack_records(folder: Path) -> Parcel:
    """What an arm is made from another's: its records, without adapter and checkpoints."""
    left_out = {layout.SAMPLES_PAGE, *(file.name for file in checkpoint_files(folder))}
    files = [file for file in sorted(folder.glob("*")) if file.is_file() and file.name not in left_out]
    return {file.name: file.read_bytes() for file in files if not file.name.startswith(".")}


def pack_cell(folder: Path) -> Parcel:
    """What the pairs of a cell share, as far as it is there."""
    return {name: (folder / name).read_bytes() for name in OF_A_CELL if (folder / name).is_file()}


def unpack(parcel: Parcel, folder: Path) -> None:
    """Put a folder in place of what is there, whole or not at all.

    Raises:
        RunError: where a name in it leads elsewhere.
    """
    check_names(parcel)
    with whole_or_not(folder) as scratch:
        scratch.mkdir(parents=True)
        for name, content in parcel.items():
            file = scratch / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def add_missing(parcel: Parcel, folder: Path) -> None:
    """Write the files that a folder lacks.

    Raises:
        RunError: where a name leads elsewhere.
    """
    check_names(parcel)
    for name, content in parcel.items():
        if not (folder / name).exists():
            with whole_or_not(folder / name) as scratch:
                scratch.write_bytes(content)


def check_names(names: Iterable[str]) -> None:
    """See that names are those of files below a folder.

    Raises:
        RunError: where one may lead elsewhere.
    """
    for name in names:
        if not all(_PART.fullmatch(part) for part in name.split("/")):
            raise RunError(
                _("a file named {name!r} was sent, and is not taken: it may lead elsewhere").format(name=name)
            )
