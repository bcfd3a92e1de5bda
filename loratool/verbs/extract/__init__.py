"""The parts of `extract`."""
