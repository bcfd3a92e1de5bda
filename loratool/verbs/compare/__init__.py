"""The `compare` verb: adapters, checkpoints, or a merge and its sources, against each other.

- `compare`: the verb itself: opens the files, tells which comparison is meant, and sums up adapters.
- `adapters`: adapters, module by module under common names.
- `checkpoints`: two checkpoints, tensor by tensor.
- `merges`: a merged checkpoint against what its base and adapters say that it should be.
"""
