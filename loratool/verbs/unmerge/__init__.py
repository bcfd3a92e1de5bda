"""The verb `unmerge`: the base again of a merged checkpoint.

- `restore`: restores the base to the bit, from the undo file of the merge.
- `unmerge`: the function that users call, and its report; without an undo file, subtracts the adapters.
"""
