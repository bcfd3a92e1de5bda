"""From the names in files to modules: which module a key is of, which model it is for, where in a base its weight lies.

- `listing`: sorts the keys of an adapter's header into modules and their leaves.
- `detect`: finds the architectures whose tables explain the modules' names and shapes.
- `routes`: looks up what a module is called in another format.
- `identify`: names the architectures and the formats that an adapter's names agree with.
- `stacks`: says which way a base stores stacked experts, and where one expert lies.
- `places`: finds the rows of a base checkpoint's tensors that a module's weight takes.
- `resolve`: chooses the architecture by which an adapter is converted.
"""
