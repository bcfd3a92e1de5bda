"""Bytes on disk: headers, tensors, outputs that appear complete or not at all, hashes, histories and locks."""
