"""The parts of `inspect`."""
