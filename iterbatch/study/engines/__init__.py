"""Ways to train the pairs of a study: in this process, or shared out over several."""
