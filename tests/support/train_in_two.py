"""A Trainer with repeats, in one process or several of the same batches: writes what each has decided."""

import json
import sys
from pathlib import Path

import torch
from support.steps import blocks
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from iterbatch.config import ModelConfig
from iterbatch.integrations.transformers import RepeatMixin
from iterbatch.model.lora import attach_adapter


class Ours(RepeatMixin, Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def main(model, folder):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = attach_adapter(base, "float32", ModelConfig(lora_dropout=0.0), [1])
    rows = [{"input_ids": row, "labels": row.clone()} for row in torch.from_numpy(blocks(24)).long()]
    for row in rows:
        row["labels"][0] = -100  # nothing predicts it; Transformers 5.0 counts it all the same
    processes = TrainingArguments(folder, use_cpu=True).world_size
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=4 // processes,
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
        adapted, args, train_dataset=rows, strategy="abr", knobs={"loss_threshold": 4.167}, match="tokens"
    )
    trainer.train()
    records = [
        {"done": each.repeats_done, "losses": each.losses, "tokens": each.tokens}
        for each in trainer.repeats.records
    ]
    file = Path(folder) / f"{trainer.args.process_index}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
