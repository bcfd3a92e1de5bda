"""What `compare` is made of: adapters, checkpoints, and merges against what they should be."""
