"""The parts of `unmerge`."""
