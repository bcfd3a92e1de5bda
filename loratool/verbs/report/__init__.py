"""The parts of `report`."""
