"""Repeats in a loop of one's own with Accelerate: three lines.

python examples/accelerate_loop.py [--model NAME] [--text FILE] [--epochs N]
accelerate launch examples/accelerate_loop.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import iterbatch
from iterbatch.config import ASSETS

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> iterbatch.Repeater:
    """Train, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS))
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "README.md")
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.model_max_length = 10**9  # it is cut into rows here
    tokens = tokenizer(given.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in tokens.split(64) if len(row) == 64]

    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, use_safetensors=True)
    last = base.config.num_hidden_layers - 1  # adapters on the last layer alone: repeats skip what is below
    lora = LoraConfig(r=16, layers_to_transform=[last], target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-3)
    loader = DataLoader(rows, batch_size=4, shuffle=True)

    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    repeater = iterbatch.Repeater(
        model, optimizer, "abr", accelerator=accelerator, clip_norm=1.0, loss_threshold=3.0
    )
    for _ in range(given.epochs):
        for batch in loader:
            repeater(batch)  # in place of forward, backward, clipping, step and zero_grad

    ledger = repeater.ledger
    accelerator.print(f"{ledger.batches} batches, {ledger.updates} updates, prefix reused: {repeater.reuses}")
    return repeater


if __name__ == "__main__":
    main()
