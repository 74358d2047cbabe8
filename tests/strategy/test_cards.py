"""Every strategy has a card, and the index of cards is the registry's own."""

import pytest
from conftest import ROOT

from iterbatch.strategy import STRATEGIES, knobs

CARDS = ROOT / "docs" / "strategies"
PARTS = ("Idea", "Formula", "Cost", "Knobs", "Logged", "Failure", "Command", "Results")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_card_has_all_its_parts(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert [part for part in PARTS if f"## {part}" not in text] == []


def test_the_index_says_what_the_strategies_say_of_themselves():
    rows = [
        f"| [{name}]({name}.md) | {kind.summary} | {kind.question} |"
        for name, kind in STRATEGIES.items()
        if kind.__module__.startswith(
            "iterbatch."
        )  # another test of this process may have registered its own
    ]
    table = "\n".join(
        ["| strategy | how a batch is trained | what the report answers |", "| --- | --- | --- |", *rows]
    )
    assert table in (CARDS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_says_what_it_does_and_its_knobs_can_be_set(name):
    assert STRATEGIES[name].summary
    shared = knobs()
    for knob in shared.values():
        assert knob.knob.documentation.strip()


def test_a_registered_strategy_brings_its_own_knob():
    from dataclasses import dataclass
    from typing import Annotated

    from iterbatch.checks import make_config
    from iterbatch.config import Knob
    from iterbatch.errors import ConfigError
    from iterbatch.strategy import BaseTrainingStrategy, make_strategy

    @dataclass(eq=False)
    class Hard(BaseTrainingStrategy):
        hard: Annotated[float, Knob("initial loss above which a batch gets two passes", above=0)] = 3.0

        def repeats(self, initial_loss):
            return 2 if initial_loss > self.hard else 1

    STRATEGIES["hard"] = Hard
    try:
        config = make_config(strategies=["baseline", "hard"], hard=4.0)
        assert make_strategy("hard", config.strategy.knobs, seed=0).repeats(3.5) == 1
        assert config.flat()["hard"] == 4.0
        with pytest.raises(ConfigError, match="--hard is -1; it must be above 0"):
            make_config(strategies=["hard"], hard=-1)
    finally:
        del STRATEGIES["hard"]
