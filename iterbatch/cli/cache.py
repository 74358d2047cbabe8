"""``iterbatch cache``."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table
from rich.text import Text

from iterbatch.cli.command import Words
from iterbatch.config import Knob
from iterbatch.errors import ConfigError
from iterbatch.language import _
from iterbatch.report.wording import plain

if TYPE_CHECKING:
    from iterbatch.reuse.store import StoreInfo


@dataclass(frozen=True)
class Cache:
    """Show or free the activations that --reuse epoch keeps on disk."""

    action: Annotated[
        tyro.conf.Positional[Literal["list", "clear"]],
        Knob("list: what is there; clear: delete it, except what a run is using."),
    ]
    keys: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        Knob("clear only these, as list shows them; a beginning is enough."),
    ] = ()
    yes: Annotated[bool, Knob("clear: do not ask.")] = False

    def execute(self, words: Words, console: Console) -> int:
        """Print what is there, or what was freed."""
        from iterbatch.reuse import store

        if self.action == "list":
            print_stores(console, store.list_stores())
            return 0
        if not self.yes and not _confirmed(console, store.chosen_stores(self.keys)):
            console.print(Text(_("Nothing is deleted.")))
            return 0
        deleted, left = store.clear_stores(self.keys)
        freed = sum(each.gigabytes for each in deleted)
        console.print(
            Text(_("{count} store(s) deleted, {freed:.3f} GB freed").format(count=len(deleted), freed=freed))
        )
        for each in left:
            console.print(Text(_("{key} is in use or holds a link, left alone").format(key=each.key)))
        return 0


def _confirmed(console: Console, stores: "list[StoreInfo]") -> bool:
    """Ask, where somebody can answer."""
    if not stores:
        return True
    what = _("{count} store(s), {value:.3f} GB").format(
        count=len(stores), value=sum(each.gigabytes for each in stores)
    )
    if not sys.stdin.isatty():
        raise ConfigError(
            _("`iterbatch cache clear` would delete {what}, and there is nobody to ask; add --yes").format(
                what=what
            )
        )
    return Confirm.ask(_("Delete {what}?").format(what=what), console=console, default=False)


def print_stores(console: Console, stores: "list[StoreInfo]") -> None:
    """A row a store."""
    from iterbatch.reuse.store import stores_folder

    if not stores:
        console.print(
            Text(_("No activations are kept in {stores_folder}.").format(stores_folder=stores_folder()))
        )
        return
    table = Table(title=Text(str(stores_folder())))
    columns = (_("key"), _("model"), _("text"), _("frozen layers"), "dtype", _("stored"), "GB", _("in use"))
    for column in columns:
        table.add_column(column, justify="right" if column in (_("stored"), "GB") else "left")
    for each in stores:
        header, key = each.header, each.header.get("key")
        key = key if isinstance(key, dict) else {}
        shown = [plain(str(header.get(name, "?"))) for name in ("model", "text")] + [
            str(key.get(name, "?")) for name in ("cut", "dtype")
        ]
        cells = [
            plain(each.key),
            *shown,
            f"{each.stored} of {plain(str(header.get('items', '?')))}",
            f"{each.gigabytes:.3f}",
            "yes" if each.in_use else "",
        ]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(
        Text(
            _("{value:.3f} GB in all. iterbatch cache clear [KEY ...] frees it.").format(
                value=sum(each.gigabytes for each in stores)
            )
        )
    )
