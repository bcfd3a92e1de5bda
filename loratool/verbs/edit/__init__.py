"""`edit`: modules dropped or scaled, in the order in which data flows.

- `edit`: which factor each module gets, from globs, blocks and components, and the report.
- `rescale`: the file with those factors in it, where its own spelling keeps the scale.
"""
