"""The parts of `merge`."""
