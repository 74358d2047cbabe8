"""A Trainer with repeats, in one process or several of the same batches: writes what each has decided."""

import json
import sys
from pathlib import Path

import torch
from support.steps import blocks
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from iterbatch import BaseTrainingStrategy
from iterbatch.config import ModelConfig
from iterbatch.integrations.transformers import RepeatMixin
from iterbatch.model.lora import attach_adapter, copy_adapter


class Ours(RepeatMixin, Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def padded(rows):
    """Rows of several lengths, to the longest: what a batch costs differs between processes."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def trained(model, folder, unit):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = attach_adapter(base, "float32", ModelConfig(lora_dropout=0.0), [1])
    rows = [{"input_ids": row, "labels": row.clone()} for row in torch.from_numpy(blocks(24)).long()]
    for number, row in enumerate(rows):
        end = len(row["labels"]) - 4 * (number % 3 == 0)
        row["input_ids"], row["labels"] = row["input_ids"][:end], row["labels"][:end]
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=4 // TrainingArguments(folder, use_cpu=True).world_size,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=0.01,
        ddp_find_unused_parameters=False,
    )
    trainer = Ours(
        adapted, args, train_dataset=rows, data_collator=padded, strategy=OneTwoThree(), match=unit
    )
    trainer.train()
    records = [
        {"done": each.repeats_done, "losses": each.losses, "tokens": each.tokens, "rate": each.learning_rate}
        for each in trainer.repeats.records
    ]
    weights = {name: float(each.double().sum()) for name, each in copy_adapter(adapted).items()}
    return trainer, {"records": records, "weights": weights}


class OneTwoThree(BaseTrainingStrategy):
    def repeats(self, initial_loss):
        return 1 + int(initial_loss * 100) % 3  # of the loss alone, which all must know alike


def main(model, folder):
    found = {}
    for unit in ("tokens", "flops"):
        trainer, found[unit] = trained(model, folder, unit)
    file = Path(folder) / f"{trainer.args.process_index}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
