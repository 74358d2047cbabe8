"""One arm with one seed: model and text made ready, the arm trained, its records left in its folder."""
