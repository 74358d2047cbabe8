"""What a practitioner gains from `enable_prefix_reuse` without ever repeating a batch.

    python studies/get_smollm2.py smollm2
    python benchmarks/inside_trainer.py --model smollm2 --rounds 3

Three epochs of TRL's SFTTrainer on dialogues, LoRA on the upper quarter and half of the layers, with and
without `cache="epoch"`: the same rows, rates and adapters. What is compared takes turns within a round;
figures are medians over rounds of ratios within a round. Both must end with the same loss.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import iterbatch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DATA = Path(os.environ.get("ITERBATCH_DATA") or "../shared/data")


class Epochs(TrainerCallback):
    """When each epoch ended."""

    def on_train_begin(self, *_, **__):
        """The first begins."""
        self.at = [time.perf_counter()]

    def on_epoch_end(self, *_, **__):
        """One has ended."""
        self.at.append(time.perf_counter())


def rows_of(tokenizer, count: int, length: int) -> list[dict]:
    """Dialogues as rows of one length, as packing gives them once and for all."""
    text = (DATA / "dialogue" / "casino" / "train.jsonl").read_text(encoding="utf-8")[: count * length * 12]
    ids = tokenizer(text).input_ids
    rows = [ids[at : at + length] for at in range(0, len(ids) - length, length)][:count]
    return [{"input_ids": row} for row in rows]


def trained(arguments, rows, layers: list[int], *, reuse: bool) -> dict:
    """One run: seconds of each epoch, and the last loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), use_safetensors=True
    )
    clock = Epochs()
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(arguments.scratch),
            per_device_train_batch_size=4,
            num_train_epochs=3,
            learning_rate=1e-3,
            bf16=arguments.dtype == "bfloat16",
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            max_length=arguments.length,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, layers_to_transform=layers, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    kept = iterbatch.enable_prefix_reuse(trainer.model, cache="epoch") if reuse else None
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [after - before for before, after in zip(clock.at, clock.at[1:], strict=False)]
    return {"epochs": seconds, "loss": losses[-1], "served": kept.rows_served if kept else 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--scratch", type=Path, default=Path("results/inside-trainer"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.model_max_length = 10**9
    rows = rows_of(tokenizer, arguments.rows, arguments.length)
    count = AutoModelForCausalLM.from_pretrained(
        arguments.model, use_safetensors=True
    ).config.num_hidden_layers
    for share in arguments.shares:
        layers = list(range(count - round(share * count), count))
        whole, later, apart = [], [], []
        for index in range(arguments.rounds):
            pair = {}
            for reuse in (False, True) if index % 2 == 0 else (True, False):
                pair[reuse] = trained(arguments, rows, layers, reuse=reuse)
            whole.append(sum(pair[False]["epochs"]) / sum(pair[True]["epochs"]))
            later.append(statistics.mean(pair[True]["epochs"][1:]) / pair[True]["epochs"][0])
            apart.append(pair[True]["loss"] - pair[False]["loss"])
            print(json.dumps({"layers": len(layers), "round": index, **{str(k): v for k, v in pair.items()}}))
        gain = f"{statistics.median(whole):.2f} ({min(whole):.2f}-{max(whole):.2f})"
        print(
            f"top {len(layers)} of {count} layers, {len(rows)} rows x {arguments.length}, 3 epochs: "
            f"plain over reuse {gain}; a later epoch over the first {statistics.median(later):.2f}; "
            f"last loss apart by at most {max(map(abs, apart)):.2g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
