"""The `delta` verb: ΔW itself, measured and written whole.

- `delta`: the verb itself: opens the inputs, runs over all changes and reports.
- `sources`: the changes, one by one: of an adapter, or between two checkpoints.
- `measure`: how large a change is, and its ranks and singular values.
- `file`: the names and the dtype under which changes are written.
"""
