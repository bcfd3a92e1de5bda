"""The value in which the three tables meet: read, renamed, spelled, written."""
