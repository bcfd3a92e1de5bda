"""Numerics on tensors, without any knowledge of adapters. In the order of use:

- `settings`: torch's own settings while a verb works, put back afterwards.
- `threads`: pieces of work on threads of one core each, and the cores and memory there are.
- `workload`: how long work takes on the CPU and on a GPU, by measured rates.
- `faults`: what a device's errors mean.
- `device_choice`: which devices a verb computes on, each tried first.
- `devices`: the CPU or the GPUs that the pieces are computed on, and tensors sent to them.
- `linalg`: norms, spectra and angles of products of factors.
- `krylov`: the leading singular triples of a dense matrix.
- `ranks`: rules that choose a rank from a spectrum, and the purchase of ranks within a budget.
- `budgets`: one budget over all modules, with spectra computed only as far as needed.
- `factor`: a matrix as the two factors that are stored, and their measured error.
- `rounding`: ULPs, neighbours and stochastic rounding to a stored dtype.
- `residuals`: the distances of stored numbers from a guess at them, packed.
"""
