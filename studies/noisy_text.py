"""Dialogues of which a share says nothing: every word of theirs is drawn from the words of all.

    python studies/noisy_text.py ITERBATCH_DATA/dialogue/casino noisy

Such a dialogue has a high loss that no training lowers beyond the frequencies of words. The other files of
the folder are copied as they are. The same input gives the same output.
"""

import argparse
import json
import random
from pathlib import Path

SHARE, SEED = 0.5, 0


def noisy(lines: list[str], share: float, seed: int) -> list[str]:
    """Every dialogue that is drawn gets words for words; lengths, speakers and order stay."""
    chance = random.Random(seed)
    dialogues = [json.loads(line) for line in lines]
    words = [word for each in dialogues for turn in each["turns"] for word in turn["text"].split()]
    for dialogue in dialogues:
        if chance.random() < share:
            for turn in dialogue["turns"]:
                turn["text"] = " ".join(chance.choice(words) for _ in turn["text"].split())
    return [json.dumps(each, ensure_ascii=False) for each in dialogues]


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    flags = parser.parse_args()
    flags.target.mkdir(parents=True)
    for file in sorted(flags.source.glob("*.jsonl")):
        lines = file.read_text(encoding="utf-8").splitlines()
        lines = noisy(lines, SHARE, SEED) if file.name == "train.jsonl" else lines
        (flags.target / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
