"""Repeats inside other people's trainers: their loop stays theirs, and counts batches."""
