"""Measurements against floors and peers, each printed as a ratio of figures taken in one run."""
