"""``iterbatch export``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from iterbatch.cli.command import Words
from iterbatch.config import Knob
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries
from iterbatch.report.wording import plain


@dataclass(frozen=True)
class Export:
    """Write a trained adapter with its card to a folder of its own, or merged into its base."""

    run_dir: Annotated[tyro.conf.Positional[Path], Knob("Folder of a run, as printed at its end.")]
    to: Annotated[Path, Knob("Folder to write; it must not be there yet.")]
    strategy: Annotated[
        str | None, Knob("Whose adapter; without it the one with the lowest validation perplexity.")
    ] = None
    seed: Annotated[int | None, Knob("Adapter of this seed.")] = None
    merge: Annotated[
        bool,
        Knob("Merge it into the base's weights, and check that the model scores as the adapter does."),
    ] = False
    push_to_hub: Annotated[
        str | None, Knob("Upload the folder, too: 'owner/name', private if it is new.")
    ] = None

    def execute(self, words: Words, console: Console) -> int:
        """Write, and say what was written."""
        quiet_libraries()
        from iterbatch.bench.export import export, push

        done = export(self.run_dir, self.to, self.strategy, self.seed, merge=self.merge)
        console.print(
            Text(
                plain(
                    _("{arm} of {run_dir} is in {folder}").format(
                        arm=done.arm, run_dir=self.run_dir, folder=done.folder
                    )
                )
            )
        )
        if done.merged_ppl is not None:
            console.print(
                _("validation perplexity: merged {merged_ppl:.3f}, of the adapter {adapter_ppl:.3f}").format(
                    merged_ppl=done.merged_ppl, adapter_ppl=done.adapter_ppl
                )
            )
        if self.push_to_hub is not None:
            console.print(Text(plain(_("uploaded to {push}").format(push=push(self.to, self.push_to_hub)))))
        return 0
