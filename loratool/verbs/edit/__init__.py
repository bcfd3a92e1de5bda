"""The parts of `edit`."""
