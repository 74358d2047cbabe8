"""Records that say something else than they did."""

import json

from iterbatch.records import seal
from iterbatch.records.layout import RESULT, STUDY


def change_result(folder, **values):
    """Let a result say something else, as if it had been written so; without its records' digests."""
    file = folder / RESULT
    row = json.loads(file.read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in row.items() if key not in (seal.DIGEST, seal.RECORDS)}
    file.write_text(json.dumps(seal.sealed(kept)), encoding="utf-8")


def only_seeds(run_dir, *seeds):
    """Let a study want these seeds only."""
    file = run_dir / STUDY
    content = json.loads(file.read_text(encoding="utf-8"))
    for cell in content["cells"].values():
        cell["config"]["seeds"] = list(seeds)
    file.write_text(json.dumps(content), encoding="utf-8")
