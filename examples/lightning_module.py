"""Repeats inside Lightning.

python examples/lightning_module.py [--model NAME] [--text FILE] [--epochs N]
"""

import argparse
from pathlib import Path

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from iterbatch.config import ASSETS
from iterbatch.integrations.lightning import RepeatMixin

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Tuned(lightning.LightningModule):
    """A LLaMA with LoRA, as one would write it for automatic optimisation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        self.model = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM"))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The loss of a micro-batch."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Over the adapters."""
        return torch.optim.AdamW((each for each in self.parameters() if each.requires_grad), lr=1e-3)


class RepeatTuned(RepeatMixin, Tuned):
    """The same, whose batches are trained as often as a strategy says."""


def main() -> RepeatTuned:
    """Train, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS))
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "README.md")
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.model_max_length = 10**9  # it is cut into rows here
    tokens = tokenizer(given.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = [row for row in tokens.split(64) if len(row) == 64]

    module = RepeatTuned(
        given.model, strategy="abr", knobs={"loss_threshold": 3.0}, accumulate=2, clip_norm=1.0
    )
    trainer = lightning.Trainer(
        max_epochs=given.epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(rows, batch_size=4, shuffle=True))
    passes = [record.repeats_done for record in module.repeats.records]
    print(f"{len(passes)} batches, {sum(passes)} updates; passes of each: {passes}")
    return module


if __name__ == "__main__":
    main()
