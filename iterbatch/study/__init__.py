"""Arms by seeds: study files, pairs, the engines that train them, and the tuning of learning rates."""
