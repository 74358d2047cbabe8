"""What a run was made from: digests of its text and model, and where they are on this machine."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from iterbatch.errors import RunError
from iterbatch.language import _
from iterbatch.records import layout
from iterbatch.records.write import write_json

Places = Mapping[str, str]  # the name of a setting to an absolute path


@dataclass(frozen=True)
class Origin:
    """SHA-256 of everything that training starts from."""

    text: Mapping[str, str]  # by split
    weights: str  # of the base; empty where they are not on this machine
    tokenizer: str
    strategies: Mapping[str, str] = field(default_factory=dict)  # of the files of strategies of one's own

    def differences(self, other: "Origin") -> list[str]:
        """What is not the same, with both digests."""
        parts = [
            (_("the text of {split}").format(split=split), value, other.text.get(split))
            for split, value in self.text.items()
        ]
        parts += [(_("the weights of the base"), self.weights, other.weights)]
        parts += [(_("the tokenizer"), self.tokenizer, other.tokenizer)]
        parts += [
            (_("the strategy {name}").format(name=name), value, other.strategies.get(name))
            for name, value in self.strategies.items()
        ]
        return [
            _("{what} has SHA-256 {now}..., not {then}...").format(what=what, now=now[:16], then=then[:16])
            for what, then, now in parts
            if then and now and then != now
        ]


def read_origin(folder: Path) -> Origin | None:
    """What a run's manifest says; None where there is none, or one of an earlier version.

    Raises:
        RunError: where it cannot be read.
    """
    file = folder / layout.MANIFEST
    if not file.exists():
        return None
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))["origin"]
        text = {str(split): str(value) for split, value in content["text"].items()}
        own = {str(name): str(value) for name, value in content.get("strategies", {}).items()}
        return Origin(text, str(content["weights"]), str(content["tokenizer"]), own)
    except KeyError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise RunError(
            _("{file} cannot be read ({problem}); the run cannot be resumed").format(
                file=file, problem=problem
            )
        ) from problem


def check_origin(folder: Path, now: Origin) -> None:
    """Compare what a run was made from with what its settings lead to now.

    Raises:
        RunError: where another text, model or tokenizer is there under the same name.
    """
    then = read_origin(folder)
    changed = [] if then is None else then.differences(now)
    if changed:
        raise RunError(
            _(
                "{folder} was made from something else under the same name: {names}. Put back what was "
                "there, or start another run by another --run_name"
            ).format(folder=folder, names="; ".join(changed))
        )


# Settings that decide what of a text is trained, and how it is written.
TEXT_SETTINGS = (
    "dataset",
    "dataset_config",
    "data_dir",
    "text_field",
    "encoding",
    "loss_on",
    "special_tokens_in_text",
)


def check_alike(cells: Mapping[Path, Mapping[str, Any]]) -> None:
    """Compare what the cells of a comparison were made from, where they name the same text and model.

    Args:
        cells: Their folders, and their settings by flag.

    Raises:
        RunError: where one was made from another text, model or tokenizer under the same name.
    """
    seen: dict[tuple[str, ...], tuple[Path, Origin]] = {}
    for folder, settings in cells.items():
        origin = read_origin(folder)
        if origin is None:
            continue
        model = str(settings.get("model_name"))
        text = tuple(str(settings.get(name)) for name in TEXT_SETTINGS)
        # A chat template is part of the tokenizer, so the same rows may read otherwise under another model.
        kinds: dict[tuple[str, ...], Origin] = {
            ("model", model): Origin({}, origin.weights, origin.tokenizer),
            ("text", model, *text): Origin(origin.text, "", ""),
        }
        for words, part in kinds.items():
            other, first = seen.setdefault(words, (folder, part))
            if changed := first.differences(part):
                raise RunError(
                    _(
                        "{folder} was made from something else than {name} under the same name: {names}. "
                        "Delete the one that is not wanted and train it again"
                    ).format(folder=folder, name=other.name, names="; ".join(changed))
                )


def origin_json(origin: Origin) -> dict[str, Any]:
    """As a manifest holds it."""
    return asdict(origin)


def write_places(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep where a run's text and model are, so that its settings mean the same from any folder.

    In a file of its own, because it names folders of this machine.
    """
    named = {name: settings.get(name) for name in ("data_dir", "model_name")}
    found = {name: Path(value) for name, value in named.items() if value}
    places = {name: str(path.resolve()) for name, path in found.items() if path.exists()}
    write_json(folder / layout.PLACES, places)


def read_places(folder: Path) -> Places:
    """Those that are there still; a run of an earlier version has none."""
    try:
        content = json.loads((folder / layout.PLACES).read_text(encoding="utf-8"))
        return {str(name): str(place) for name, place in content.items() if Path(str(place)).exists()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
