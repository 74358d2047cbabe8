"""``iterbatch new-strategy``."""

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from iterbatch.cli.command import Words
from iterbatch.config import Knob
from iterbatch.errors import ConfigError, typed
from iterbatch.language import _
from iterbatch.records.write import write_text
from iterbatch.strategy import STRATEGIES

TEMPLATES = Path(__file__).parent.parent / "assets" / "strategy"


@dataclass(frozen=True)
class NewStrategy:
    """Write a strategy of your own to begin with: its class, a test of it and its card."""

    name: Annotated[tyro.conf.Positional[str], Knob("Of the class, for example TwiceWhenHard.")]
    to: Annotated[Path, Knob("Folder that the files are written into.")] = Path()

    def execute(self, words: Words, console: Console) -> int:
        """Write the files, and print how the strategy is used."""
        if not self.name.isidentifier() or keyword.iskeyword(self.name) or not self.name.isascii():
            rule = _("write letters, digits and _, not first a digit")
            raise ConfigError(_("'{name}' cannot name a class; {rule}").format(name=self.name, rule=rule))
        if self.name in STRATEGIES:
            raise ConfigError(
                _("there is a strategy {name} already; give yours another name").format(name=self.name)
            )
        module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.name).lower()
        files = {
            "strategy.py.txt": self.to / f"{module}.py",
            "test_strategy.py.txt": self.to / f"test_{module}.py",
            "card.md": self.to / f"{module}.md",
        }
        if there := [str(file) for file in files.values() if file.exists()]:
            raise ConfigError(
                _("{names} exists already; delete it, or give another --to").format(names=", ".join(there))
            )
        own = {"{name}": self.name, "{module}": module, "{file}": f"{module}.py"}
        for template, file in files.items():
            text = (TEMPLATES / template).read_text(encoding="utf-8")
            for mark, value in own.items():
                text = text.replace(mark, value)
            write_text(file, text)
            console.print(Text(_("wrote {file}").format(file=file)))
        code = files["strategy.py.txt"]
        command = typed("iterbatch", "train", "--strategies", "baseline", f"{code}:{self.name}")
        console.print(Text(_("Try it:   {command} --match flops").format(command=command)))
        console.print(
            Text(
                _("Test it:  pytest {test_strategy_py_txt}").format(
                    test_strategy_py_txt=files["test_strategy.py.txt"]
                )
            )
        )
        return 0
