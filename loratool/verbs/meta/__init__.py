"""The parts of `meta`."""
