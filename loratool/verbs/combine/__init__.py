"""The parts of `combine`."""
