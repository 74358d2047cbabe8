"""The commands of the original experiment, as its author wrote them."""

BASE = "--model llama --model_name huggyllama/llama-7b --dataset wikitext"
ORIGINAL = [
    f"{BASE} --strategies baseline --epochs 3 --batch_size 4",
    f"{BASE} --strategies abr --epochs 3 --batch_size 4 --loss_threshold 2.0 --max_repeats 5",
    f"{BASE} --strategies learnable --epochs 3 --batch_size 4",
    f"{BASE} --strategies window --epochs 3 --batch_size 4 --window_size 5 --loss_threshold 2.0 "
    "--max_repeats 1",
    f"{BASE} --strategies baseline abr learnable window --epochs 3 --batch_size 4",
]
