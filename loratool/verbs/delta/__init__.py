"""The parts of `delta`."""
