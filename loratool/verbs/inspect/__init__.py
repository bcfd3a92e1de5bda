"""`inspect`: what a file is, in the order in which data flows.

- `describe`: words for a listing: whose format it is, what is odd about it, its metadata in short. No torch.
- `values`: norms and spectra of the tensors, which alone need torch.
- `inspect`: the reports on adapters and checkpoints, from headers and from `values` where those are asked for.
- `block_map`: ‖ΔW‖ by block and sort of module, of an adapter that was loaded.
"""
