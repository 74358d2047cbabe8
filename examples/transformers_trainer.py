"""Repeats inside Transformers' Trainer, and a frozen prefix that runs once an epoch.

python examples/transformers_trainer.py [--model NAME] [--text FILE] [--epochs N]
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import iterbatch
from iterbatch.config import ASSETS
from iterbatch.integrations.transformers import RepeatMixin

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class RepeatTrainer(RepeatMixin, Trainer):
    """The Trainer, whose batches are trained as often as a strategy says."""


def main() -> Trainer:
    """Train, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS))
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "README.md")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="trainer-out")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.model_max_length = 10**9  # it is cut into rows here
    tokens = tokenizer(given.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in tokens.split(64) if len(row) == 64]

    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, use_safetensors=True)
    upper = range(base.config.num_hidden_layers // 2, base.config.num_hidden_layers)
    model = get_peft_model(
        base,
        LoraConfig(r=16, layers_to_transform=list(upper), target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    reuse = iterbatch.enable_prefix_reuse(
        model, cache="epoch"
    )  # the lower half runs once a row, not once a pass

    trainer = RepeatTrainer(
        model,
        TrainingArguments(
            given.out,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=given.epochs,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            logging_steps=5,
        ),
        train_dataset=rows,
        strategy="abr",
        knobs={"loss_threshold": 3.0},
        match="flops",  # spend what the plain Trainer would, and end the schedule there
    )
    trainer.train()
    ledger = trainer.repeats.ledger
    print(f"{ledger.batches} batches, {ledger.updates} updates, {ledger.flops:.3g} FLOPs")
    print(f"frozen layers: {reuse.rows_computed} rows computed, {reuse.rows_served} served")
    return trainer


if __name__ == "__main__":
    main()
