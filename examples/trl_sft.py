"""Repeats inside TRL's SFTTrainer, on prompts and completions.

python examples/trl_sft.py [--model NAME] [--epochs N]
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from iterbatch.config import ASSETS
from iterbatch.integrations.transformers import RepeatMixin

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAIRS = [
    {"prompt": "What is a batch? ", "completion": "All micro-batches of one optimizer update."},
    {"prompt": "What is a pass? ", "completion": "A forward, a backward and an update on a batch."},
    {"prompt": "What is a repeat? ", "completion": "Any pass on a batch after the first."},
    {"prompt": "What is a budget? ", "completion": "What an arm may spend."},
]


class RepeatSFTTrainer(RepeatMixin, SFTTrainer):
    """SFTTrainer, whose batches are trained as often as a strategy says."""


def main() -> SFTTrainer:
    """Train, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="sft-out")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = RepeatSFTTrainer(
        AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, use_safetensors=True),
        SFTConfig(
            given.out,
            per_device_train_batch_size=4,
            num_train_epochs=given.epochs,
            learning_rate=1e-3,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=2,
        ),
        train_dataset=Dataset.from_list(PAIRS * 8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        strategy="abr",
        knobs={"loss_threshold": 2.0},
    )
    trainer.train()
    passes = [record.repeats_done for record in trainer.repeats.records]
    print(f"{len(passes)} batches, {sum(passes)} updates; passes of each: {passes}")
    return trainer


if __name__ == "__main__":
    main()
