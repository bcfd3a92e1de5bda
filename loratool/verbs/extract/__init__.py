"""The `extract` verb: the difference of two checkpoints becomes an adapter.

- `extract`: the verb itself: pairs the parameters, plans the run, writes the adapter and reports.
- `forms`: how a format carries the change of each parameter: as a LoRA, as a leaf of its own, or not at all.
- `job`: runs over all pairs, by a rule or within a budget.
- `outcomes`: from one parameter of both checkpoints to its delta, with the measured error.
- `journal`: keeps outcomes on the disk, so that an interrupted run can go on.
- `assemble`: the outcomes as the changes of one adapter, and the reasons for what is left out.
"""
