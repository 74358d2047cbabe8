"""Pretrain the bundled base: a small LLaMA on detokenised WikiText-2 and STAR.

Checkpointed, to be continued in another sitting.

    python studies/pretrain_base.py --data ../shared/data --work pretrain --minutes 100
    python studies/pretrain_base.py --data ../shared/data --work pretrain --minutes 60    # resumes it
    python studies/pretrain_base.py --data ../shared/data --work pretrain --export iterbatch/assets/base
    python studies/pretrain_base.py --data ../shared/data --work larger --width 320 --layers 12 --rows 32 \
        --epochs 8                                                   # 16.5 M parameters; on a GPU two minutes

It trains on the first 80% of each corpus's training documents; the last 20% are written to
``<work>/heldback/`` for studies. The learning rate is constant and falls linearly to zero over the
last fifth of ``--minutes`` or ``--epochs``, so a run that is stopped early can be continued with a new decay.
Matrices are trained by Muon, embeddings and norms by AdamW.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iterbatch.data.blocks import prepare_blocks
from iterbatch.data.corpus import read_corpus
from iterbatch.data.documents import Document
from iterbatch.data.windows import collate, prepare_eval

VOCABULARY, CONTEXT = 4096, 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SOURCES = {"wikitext-2": "wikitext-2", "star": "dialogue/star"}


def split_documents(
    data: Path,
) -> tuple[list[Document], dict[str, list[Document]], dict[str, list[Document]]]:
    """Training documents of both corpora, the held-back fifths, and validation documents."""
    train: list[Document] = []
    heldback, validation = {}, {}
    for name, folder in SOURCES.items():
        splits = read_corpus(name, data_dir=data / folder).splits
        cut = int(0.8 * len(splits["train"]))
        train += splits["train"][:cut]
        heldback[name], validation[name] = splits["train"][cut:], splits["validation"]
    return train, heldback, validation


def train_tokenizer(documents: list[Document], folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens; ``<unk>``, which WikiText-2 writes for rare words, is one token."""
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((document.text for document in documents), trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
            model_max_length=CONTEXT,
        )
        fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def new_model(width: int, layers: int) -> LlamaForCausalLM:
    """A LLaMA with heads of 32, an MLP of 8/3 of the width, and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=32 * round(width / 12),
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [
        p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=6e-3, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def learning_rate_factor(done: float, updates: int, decay: float = 0.2) -> float:
    """Warm-up over 100 updates, constant, then linear to zero over the last ``decay`` of all.

    Args:
        done: Share of all that is done.
        updates: Made so far.
        decay: Share of all over which the rate falls.
    """
    warm = min(1.0, (updates + 1) / 100)
    return warm * max(0.0, min(1.0, (1 - done) / decay))


@torch.no_grad()
def validation_loss(model, tokenizer, texts) -> dict[str, float]:
    """Mean nats a token of each validation text, and over all."""
    model.eval()
    result, all_nats, all_tokens = {}, 0.0, 0
    for name, text in texts.items():
        nats = 0.0
        for start in range(0, len(text.windows), 16):
            micro = collate(text.windows[start : start + 16], tokenizer.pad_token_id).to(DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                logits = model(input_ids=micro.input_ids, use_cache=False).logits
            nats += torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), micro.labels.flatten(), reduction="sum"
            ).item()
        result[name] = nats / text.tokens
        all_nats, all_tokens = all_nats + nats, all_tokens + text.tokens
    model.train()
    return {**result, "all": all_nats / all_tokens}


def save(work: Path, model, opts, state: dict) -> None:
    bundle = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "state": state}
    torch.save(bundle, work / "checkpoint.tmp")
    os.replace(work / "checkpoint.tmp", work / "checkpoint.pt")


def pretrain(flags: argparse.Namespace) -> None:
    """Train until the time or the epochs are over."""
    data, work = flags.data, flags.work
    work.mkdir(parents=True, exist_ok=True)
    train, heldback, validation = split_documents(data)
    write_heldback(heldback, work / "heldback")
    tokenizer = train_tokenizer(train, work / "tokenizer")
    digest = hashlib.sha256("".join(document.text for document in train).encode()).hexdigest()
    blocks = prepare_blocks(train, tokenizer, CONTEXT, data_key=f"pretrain-base-{digest}").ids
    texts = {
        name: prepare_eval(documents, tokenizer, CONTEXT, 40_000) for name, documents in validation.items()
    }
    model = new_model(flags.width, flags.layers).to(DEVICE)
    opts = optimizers(model)
    state = {"updates": 0, "tokens": 0, "seconds": 0.0}
    if (work / "checkpoint.pt").exists():
        bundle = torch.load(work / "checkpoint.pt", weights_only=True)
        model.load_state_dict(bundle["model"])
        for optimizer, saved in zip(opts, bundle["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        state = bundle["state"]
    for layer in model.model.layers if DEVICE.type == "cpu" else ():
        layer.compile()  # 1.6 times as fast on two cores
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(blocks) * CONTEXT:,} training tokens, from {state}", flush=True)
    start = saved_at = time.monotonic()
    while True:
        elapsed = time.monotonic() - start
        done = elapsed / 60 / flags.minutes
        if flags.epochs:
            done = state["updates"] / (flags.epochs * (len(blocks) // flags.rows))
        if done >= 1:
            break
        factor = learning_rate_factor(done, state["updates"])
        loss = one_update(model, opts, blocks, state, factor, flags.rows)
        if state["updates"] % 100 == 0:
            print(
                f"{state['updates']:6d} updates {state['tokens']:>11,} tokens  {elapsed / 60:6.1f} min  lr "
                f"x{factor:.2f}  {loss.item():.3f}",
                flush=True,
            )
        if time.monotonic() - saved_at > 240:
            saved_at = time.monotonic()
            report(work, model, tokenizer, texts, state, elapsed)
            save(work, model, opts, state | {"seconds": state["seconds"] + elapsed})
    state["seconds"] += time.monotonic() - start
    save(work, model, opts, state)
    report(work, model, tokenizer, texts, state, time.monotonic() - start)


def one_update(model, opts, blocks: np.ndarray, state: dict, factor: float, rows: int) -> torch.Tensor:
    """Forward, backward and update on the next blocks of an endless stream of shuffled epochs."""
    per_epoch = len(blocks) // rows
    epoch, position = divmod(state["updates"], per_epoch)
    order = np.random.default_rng([7, epoch]).permutation(len(blocks))
    ids = torch.from_numpy(blocks[np.sort(order[position * rows : (position + 1) * rows])].astype(np.int64))
    ids = ids.to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
    state["updates"] += 1
    state["tokens"] += ids.numel()
    return loss.detach()


def report(work: Path, model, tokenizer, texts, state: dict, elapsed: float) -> None:
    losses = validation_loss(model, tokenizer, texts)
    print("validation", {k: round(v, 4) for k, v in losses.items()}, flush=True)
    line = json.dumps(state | {"elapsed": elapsed, "validation": losses})
    with (work / "curve.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_heldback(heldback: dict[str, list[Document]], folder: Path) -> None:
    """Write the last fifths as JSONL with a ``text`` field, one folder each, for ``--data_dir``."""
    for name, documents in heldback.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": document.text}, ensure_ascii=False) + "\n" for document in documents)
        (folder / name / "documents.jsonl").write_text("".join(lines), encoding="utf-8")


def export(flags: argparse.Namespace) -> None:
    """Write the model as a plain Hugging Face folder in bf16."""
    work, target = flags.work, flags.export
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model = new_model(flags.width, flags.layers)
    bundle = torch.load(work / "checkpoint.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(bundle["model"])
    model = model.to(torch.bfloat16)
    model.generation_config.suppress_tokens = [
        tokenizer.unk_token_id
    ]  # WikiText-2's <unk> is text to be scored, not to be written
    model.save_pretrained(target, max_shard_size="15MB")
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ITERBATCH_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path("pretrain"))
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--epochs", type=float, help="train for so many instead of for a time")
    parser.add_argument("--rows", type=int, default=16, help="blocks of 256 tokens in a batch")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--export", type=Path, help="write the checkpoint as a Hugging Face folder, and train nothing"
    )
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments)
    else:
        pretrain(arguments)


if __name__ == "__main__":
    main()
