"""Adapters as values, whatever format they came in: read, changed, renamed, spelled, written and compared.

In the order in which data flows through them:

- `adapter`: an adapter in memory, as the changes that it makes.
- `load`: files as adapters, at once or module by module.
- `selection`: which modules a verb takes.
- `strengths`: how strongly each module counts.
- `approximate`: deltas as LoRA, by a rule or within a budget.
- `rename`: changes under the names of another naming.
- `spell`: changes as the tensors of a format.
- `same_format`: an adapter in the spelling of the file that it came from.
- `write`: an adapter as a file of some format.
- `verify`: what was written against what was read.
"""
