"""What a run leaves: the names of its files, writing them whole or not at all, and reading them back."""
