"""The catalogues of messages: ``PYTHONPATH=. python tests/support/messages.py`` brings them up to date.

New messages are added untranslated, those that are gone are dropped, and what is translated is compiled.
"""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from iterbatch.cli.main import DOCS
from iterbatch.language import CATALOGUES

ROOT = Path(__file__).parents[2]
PO = CATALOGUES / "zh" / "LC_MESSAGES" / "iterbatch.po"
KEYWORDS = ["-k", "N_", "-k", "Knob", "-k", "in_figure", "-k", "Also:2"]


def extracted() -> set[str]:
    """Every message: those that the sources mark, and what commands say of themselves."""
    with tempfile.TemporaryDirectory() as scratch:
        pot = Path(scratch) / "iterbatch.pot"
        command = [
            sys.executable,
            "-m",
            "babel.messages.frontend",
            "-q",
            "extract",
            "-F",
            "babel.cfg",
            *KEYWORDS,
        ]
        subprocess.run([*command, "-o", str(pot), "."], cwd=ROOT, check=True)
        return {message.id for message in _read(pot) if message.id} | set(DOCS.values())


def translated(file: Path = PO) -> dict[str, str]:
    """A catalogue: message to translation."""
    return {message.id: message.string for message in _read(file) if message.id}


def compiled(file: Path = PO) -> bytes:
    """A catalogue as gettext reads it."""
    content = io.BytesIO()
    write_mo(content, _read(file))
    return content.getvalue()


def _read(file: Path) -> Catalog:
    with file.open("rb") as content:
        return read_po(content)


def update(file: Path = PO) -> list[str]:
    """Bring a catalogue up to date; returns the messages that are still to be translated."""
    known, catalogue = translated(file), Catalog(locale=file.parts[-3], project="iterbatch", fuzzy=False)
    for message in sorted(extracted()):
        catalogue.add(message, known.get(message, ""))
    with file.open("wb") as content:
        write_po(content, catalogue, width=110, no_location=True)
    file.with_suffix(".mo").write_bytes(compiled(file))
    return [message for message, said in translated(file).items() if not said]


if __name__ == "__main__":
    for left in update():
        print(left)
