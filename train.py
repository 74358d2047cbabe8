"""The original experiment's command, from a fresh clone: equals ``iterbatch train …``."""

import sys

from iterbatch.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
