"""Bytes on disk: what is read is checked before anything trusts it, and what is written appears complete or not at all.

In the order in which data flows through them:

- `strict_json`: JSON from strangers, in one reading or none.
- `header`: safetensors headers and shard indexes, checked.
- `hub`: adapters and models on the Hugging Face hub, as paths in its cache.
- `adapter_files`: where an adapter's tensors and config lie, and what they were like when they were read.
- `pickles`: old adapters, read in a process of its own.
- `layout`: which files make up a checkpoint.
- `tensors`: tensors of safetensors files, read on demand.
- `hashes`: the hashes that people know a file by.
- `history`: what an output says about where it comes from.
- `locks`: one run at a time writes an output.
- `output`: the place of an output, taken once everything is on the disk.
- `writer`: the bytes of one output file.
- `in_place`: clones that replace the files of a checkpoint.
- `adapter_writer`: an adapter's tensors, metadata and config as an output.
"""
