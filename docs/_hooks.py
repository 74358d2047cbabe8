"""For the pages of the API: names that docstrings mark for Sphinx are shown as names."""

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Take the marks away."""
    return ROLE.sub(r"<code>\1</code>", html)
