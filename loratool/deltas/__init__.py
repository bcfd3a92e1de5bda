"""Table 3, the kinds of delta: a file of mathematics for each, the `schema` of their leaves, and the `registry`."""
