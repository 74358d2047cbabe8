"""One batch: what a pass does, what it is charged, and what a strategy may ask for."""
