"""IterBatch decides how many times each batch deserves to be trained, and proves whether that paid."""

__version__ = "0.1.0"
