"""The model: loaded and frozen, adapted, cut at its lowest adapter, and what a pass over it costs."""
