"""The verbs of the library, a module or a package for each.

Those that look:

- `inspect`: what a file is and why.
- `hash`: the hashes that people know a file by.
- `env`: the versions and devices at hand.
- `check`: whether an adapter works in a program, and what would help if not.
- `compare`: adapters, checkpoints, or a merge and its sources, against each other.
- `report`: one page that shows what an adapter is, where it acts, and what being smaller would cost.

Those that make adapters:

- `extract`: the adapter that makes one checkpoint of another.
- `convert`: an adapter in another format.
- `resize`: an adapter at other ranks, and other kinds as LoRA.
- `combine`: several adapters as one.
- `edit`: an adapter without some modules, or with others at another strength.
- `meta`: a file with other metadata.
- `delta`: ΔW itself, measured and written whole.

Those that make checkpoints:

- `merge`: adapters into a checkpoint.
- `unmerge`: the base again.
- `swap`: one adapter out of a merged checkpoint, and another in.

- `reports`: what the reports of all verbs have in common.
"""
