"""The verb `merge`, whose parts `unmerge`, `swap` and `compare` use too. Data flows through them in this order:

- `terms`: cuts each change to the rows that it acts on.
- `stacks`: brings stacked experts to how the base stores them.
- `heads`: adds heads that only an adapter has.
- `sizes`: makes vocabularies and labels in config.json true.
- `plan`: finds the place of every change, and settles dtype, shape and terms of every tensor of the output.
- `segments`: makes sums over rows of a tensor's terms.
- `blocks`: reads, changes, rounds and writes a tensor's rows, and measures what rounding took.
- `added`: computes in float64 what a plan adds to a tensor, for undo files and for `unmerge`.
- `files`: writes the files that change, on several threads.
- `undo_file`: writes and reads the file that `unmerge` restores the base from.
- `write`: writes a whole output, with its configs and its history.
- `merge`: the function that users call, and its report.
"""
