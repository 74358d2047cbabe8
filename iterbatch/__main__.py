"""``python -m iterbatch …`` equals ``iterbatch …``."""

from iterbatch.train import entry_point

if __name__ == "__main__":
    entry_point()
