"""Digests by which the records of an arm are known to be those that were written with its result."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iterbatch.errors import RunError
from iterbatch.language import N_, _
from iterbatch.records import layout
from iterbatch.records.write import finite

SEALED = (layout.BATCHES, layout.EVALS, layout.DOCUMENTS, layout.SAMPLES, layout.SCHEDULER)
DIGEST, RECORDS = "digest", "records"  # of a table itself, and of the files beside it
ADVICE = N_("delete its folder and train that arm again with --resume")


def sealed(content: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """A table with its own digest, and where a folder is given, those of the records there."""
    kept = dict(content)
    if folder is not None:
        files = [folder / name for name in SEALED]
        kept[RECORDS] = {file.name: file_digest(file) for file in files if file.exists()}
    return {**kept, DIGEST: _digest(kept)}


def check(content: Mapping[str, Any]) -> None:
    """Compare a table with its own digest; earlier versions wrote none.

    Raises:
        ValueError: where it was changed.
    """
    if DIGEST in content and content[DIGEST] != _digest(content):
        raise ValueError(_("it is not as it was written"))


def check_records(content: Mapping[str, Any], folder: Path) -> None:
    """Compare the records beside a result with the digests in it; earlier versions wrote none.

    Raises:
        RunError: naming the file that was changed or is gone.
    """
    known = content.get(RECORDS)
    for name, digest in known.items() if isinstance(known, dict) else ():
        file = folder / name
        if name in SEALED and (not file.is_file() or file_digest(file) != digest):
            how = _("was changed after") if file.is_file() else _("is gone since")
            raise RunError(
                _("{file} {how} its arm ended; put it back, or {advice}").format(
                    file=file, how=how, advice=_(ADVICE)
                )
            )


def _digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(finite(rest), sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
