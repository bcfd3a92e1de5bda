"""The kinds of delta (Table 3): from a module's leaves to an object that can change a weight.

- `schema`: which leaves make up which kind, with ranks and shapes, from the header alone.
- `registry`: builds the delta of a kind from its leaves.
- `base`: what every delta can do, and what the kinds share.
- `lora`, `loralib`, `loha`, `lokr`, `multiply`, `orthogonal`, `full`: the mathematics of one kind, or of a few alike.
- `dora`, `experts`: kinds around another one's leaves.
- `sums`: several deltas on one weight as one.
- `methods`: ways to merge deltas that are no sums.
- `relations`: norms, inner products and angles of two deltas.
"""
