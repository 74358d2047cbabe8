"""Study files of a tiny model."""

import json

from iterbatch.plain_yaml import dump_yaml

NASTY = "</title><script>document.title='changed'</script><img src=x onerror=\"document.title='changed'\">"
NASTY += " **b** | [a](javascript:alert(1)) \x1b[31m"
ARMS = {
    "baseline": None,
    "abr": {"loss_threshold": 2.75},
    "permuted": None,
    "small_batches": None,
    "spaced": {"loss_threshold": 2.75},
    "fixed2": {"strategy": "fixed"},
}


def study_file(folder, tiny_folder, arms, **settings):
    """A study file of a tiny model on a text that tries everything."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.jsonl"
    lines = (
        json.dumps({"text": f"Document number {n} says: {NASTY} " + "more words " * (n % 7)}) + "\n"
        for n in range(60)
    )
    data.write_text("".join(lines), encoding="utf-8")
    common = {
        "model_name": str(tiny_folder),
        "dtype": "float32",
        "data_dir": str(data),
        "max_length": 32,
        "batch_size": 2,
        "lr": 0.01,
    }
    common |= {
        "max_train_tokens": 1024,
        "max_eval_tokens": 400,
        "evals": 3,
        "prompts": 2,
        "seeds": [0, 1],
        "log_with": "none",
    }
    file = folder / "study.yaml"
    file.write_text(dump_yaml({"settings": common | settings, "arms": arms}), encoding="utf-8")
    return file
