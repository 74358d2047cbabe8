"""``iterbatch generate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from iterbatch.cli.command import Words, check_ranges
from iterbatch.config import Knob
from iterbatch.language import _
from iterbatch.quiet import quiet_libraries
from iterbatch.report.wording import plain


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained adapter."""

    run_dir: Annotated[tyro.conf.Positional[Path], Knob("Folder of a run, as printed at its end.")]
    prompt: Annotated[str, Knob("Text to continue.")]
    strategy: Annotated[
        str | None, Knob("Whose adapter; without it the one with the lowest validation perplexity.")
    ] = None
    seed: Annotated[int | None, Knob("Adapter of this seed.")] = None
    new_tokens: Annotated[int, Knob("Tokens to write", at_least=1)] = 60
    greedy: Annotated[bool, Knob("Take the likeliest token each time instead of drawing.")] = False
    temperature: Annotated[float, Knob("Sampling temperature", above=0)] = 0.8
    top_p: Annotated[
        float, Knob("Sample from the likeliest tokens of this total probability", above=0, at_most=1)
    ] = 0.95
    sampling_seed: Annotated[int, Knob("Seed of the draws", at_least=0)] = 0
    trust_remote_code: Annotated[bool, Knob("Allow the base model to run its own Python code.")] = False

    def execute(self, words: Words, console: Console) -> int:
        """Print the prompt with its continuation."""
        check_ranges(self)
        quiet_libraries()
        from iterbatch.evaluation.generate import Sampling
        from iterbatch.evaluation.trained import continue_text

        text, name = continue_text(
            self.run_dir,
            self.prompt,
            Sampling(self.new_tokens, self.temperature, self.top_p, self.sampling_seed),
            strategy=self.strategy,
            seed=self.seed,
            greedy=self.greedy,
            trust_remote_code=self.trust_remote_code,
        )
        Console(stderr=True).print(
            Text(_("adapter of {name}").format(name=plain(name)), style="dim")
        )  # apart from the text
        console.print(Text(plain(text)), soft_wrap=True)
        return 0
