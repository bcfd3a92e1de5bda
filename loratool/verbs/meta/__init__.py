"""`meta`: the metadata of a file, changed while its tensors keep their bytes. No torch.

- `private`: metadata without what tells of people and their disks.
- `meta`: keys read, set, deleted, copied and stripped, and the file written with another header.
"""
