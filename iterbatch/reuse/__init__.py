"""Frozen-prefix activations: computed once, served again within a batch, across epochs, arms and runs."""
