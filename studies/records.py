"""Keep a comparison's records in one compact file, or lay them out again, to resume or score it anew.

    python studies/records.py pack results/pilot studies/records/pilot.parquet
    python studies/records.py unpack studies/records/pilot.parquet results/pilot
    iterbatch report results/pilot

A file has one row a record file: its path in the study's folder, and its text. Adapters and figures
are left out: pairs that are finished need neither to be reported, and are not trained again by
``iterbatch compare``. Folders named by the environment (``ITERBATCH_DATA`` and the like) are kept
by that name. A report needs none of them; training further does, so set them before unpacking for that.
"""

import argparse
import os
import re
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

KEPT = (
    "study.json",
    "config.yaml",
    "manifest.json",
    "result.json",
    "failed.json",
    "batches.jsonl",
    "evals.jsonl",
    "documents.json",
    "samples.json",
    "tuning.json",
    "scheduler.json",
    "base_losses.json",
)

SETTINGS = ("study.json", "config.yaml")  # where folders are named
PLACES = ("ITERBATCH_DATA", "ITERBATCH_SMOLLM2", "ITERBATCH_NOISY", "HELDBACK")


def pack(run_dir: Path, file: Path) -> int:
    """Write every record file below ``run_dir`` into ``file``; returns their number."""
    found = sorted(path for path in run_dir.rglob("*") if path.name in KEPT)
    if not found:
        raise SystemExit(f"error: {run_dir} has no records; give the folder of a comparison")
    texts = [_by_name(path) for path in found]
    table = pa.table({"path": [path.relative_to(run_dir).as_posix() for path in found], "text": texts})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table, file, compression="zstd", compression_level=19, use_dictionary=False, data_page_size=1 << 28
    )
    return len(found)


def _by_name(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.name in SETTINGS:
        for name in PLACES:
            if os.environ.get(name):
                text = text.replace(os.environ[name].rstrip("/"), f"${{{name}}}")
        text = re.sub(
            r'"save_dir": "[^"]*"',
            '"save_dir": "results"',
            re.sub(r"(?m)^( *)save_dir: .*$", r"\1save_dir: results", text),
        )
        if found := re.search(r'(?:data_dir|model_name)"?: "?((?:/|[A-Za-z]:[\\/])[^"\n]*)', text):
            raise SystemExit(
                f"error: {path} names {found[1]}, a folder of this machine; set one of "
                f"{', '.join(PLACES)} to it"
            )
    return text


def unpack(file: Path, run_dir: Path) -> int:
    """Write the record files in ``file`` below ``run_dir``, which must not be there yet.

    Returns their number.
    """
    if run_dir.exists() or run_dir.is_symlink():
        raise SystemExit(f"error: {run_dir} exists already; give a folder that does not")
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        path = PurePosixPath(row["path"])
        if path.is_absolute() or ".." in path.parts or path.name not in KEPT:
            raise SystemExit(
                f"error: {file} has a row of path {str(path)!r}, which is no record file; it was not made "
                "by pack"
            )
        if path.name in SETTINGS:
            row["text"] = os.path.expandvars(row["text"])  # a folder that is not named keeps its name
    for row in rows:
        path = run_dir / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["text"], encoding="utf-8", newline="")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    flags = parser.parse_args()
    if not flags.source.exists():
        raise SystemExit(f"error: {flags.source} is not there")
    number = (pack if flags.command == "pack" else unpack)(flags.source, flags.target)
    print(f"{number} files, {flags.target}")


if __name__ == "__main__":
    main()
