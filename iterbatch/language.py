"""The language of what people read: gettext catalogues, by ``--lang``, ``ITERBATCH_LANG`` or the locale.

``_`` translates a message now; ``N_`` marks one that is translated when it is shown. What is kept on disk for
other programs stays as it is: records, settings, names of columns in files.
"""

import gettext
import locale
import os
from pathlib import Path

LANGUAGES = ("en", "zh")
DOMAIN = "iterbatch"
CATALOGUES = Path(__file__).parent / "assets" / "locale"

_catalogue: gettext.NullTranslations = gettext.NullTranslations()


def _(message: str) -> str:
    """A message in the language in use."""
    return _catalogue.gettext(message) if message else ""


def N_(message: str) -> str:
    """A message that is translated when it is shown."""
    return message


def use(language: str) -> None:
    """Speak a language from now on: one of ``LANGUAGES``, others are English."""
    global _catalogue
    _catalogue = gettext.translation(DOMAIN, CATALOGUES, [language], fallback=True)


def in_use() -> str:
    """The language in use."""
    return "en" if type(_catalogue) is gettext.NullTranslations else "zh"


def _locale() -> str:
    try:
        return locale.getlocale()[0] or ""
    except ValueError:  # one that Python does not know
        return ""


def of_the_system() -> str:
    """What ``ITERBATCH_LANG`` says, or else the locale of the system."""
    given = os.environ.get("ITERBATCH_LANG") or _locale()
    return "zh" if given.lower().startswith(("zh", "chinese")) else "en"


use(of_the_system())
