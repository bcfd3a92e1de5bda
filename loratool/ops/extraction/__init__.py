"""The parts of `extract`: which parameters are the same, what they changed, how a format carries it, and what it costs."""
