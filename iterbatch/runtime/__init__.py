"""Staying alive: checkpoints, one process a run, signals, and several processes that share a batch."""
