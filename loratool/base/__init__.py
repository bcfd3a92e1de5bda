"""The checkpoint that an adapter changes, by its modules. Data flows through the files in this order:

- `base`: reads the weights of a checkpoint by their modules' names.
- `effects`: computes what a delta adds to a weight of the base.
- `pairs`: finds the parameters that two checkpoints share.
- `difference`: computes what one parameter of a tuned checkpoint changed, and how much of that rounding may be.
"""
