"""What waiting threads cost beside other work: the default run's time by GOMP_SPINCOUNT, idle and busy.

    python benchmarks/busy.py                  # 3 rounds, some 20 minutes
    python benchmarks/busy.py --rounds 1 --loops 0 2

Threads of OpenMP that wait by spinning hold cores that other work could use, and are held up by it. Every
setting is run in turn within a round, beside so many endless loops; medians and ranges are printed, to be
compared within a machine.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

SPINS = ("300000", "0", "1000", "10000", "100000")  # the first is what OpenMP does by itself
LIMIT_S = 600


@contextlib.contextmanager
def crowd(loops: int) -> Iterator[None]:
    """So many processes that do nothing but take time."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for each in found:
            each.kill()
            each.wait()


def seconds(spin: str) -> float:
    """A short run of two arms, as a process of its own; infinity where it takes too long."""
    environment = os.environ | {"GOMP_SPINCOUNT": spin}
    with tempfile.TemporaryDirectory() as scratch:
        words = ["--strategies", "baseline", "abr", "--max_train_tokens", "8192", "--max_eval_tokens", "2000"]
        command = [
            sys.executable,
            "-m",
            "iterbatch",
            "train",
            *words,
            "--log_with",
            "none",
            "--save_dir",
            scratch,
        ]
        start = time.perf_counter()
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return float("inf")
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 2, 8], help="endless loops beside it")
    arguments = parser.parse_args()
    took: dict[tuple[int, str], list[float]] = {}
    for _ in range(arguments.rounds):
        for loops in arguments.loops:
            for spin in SPINS:
                with crowd(loops):
                    took.setdefault((loops, spin), []).append(seconds(spin))
    print("| loops beside | " + " | ".join(SPINS) + " |\n|" + " --- |" * (len(SPINS) + 1))
    for loops in arguments.loops:
        cells = [took[loops, spin] for spin in SPINS]
        shown = [f"{statistics.median(each):.0f} ({min(each):.0f}-{max(each):.0f})" for each in cells]
        print(f"| {loops} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
