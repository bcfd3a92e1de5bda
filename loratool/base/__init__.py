"""The checkpoint that an adapter changes, by its modules."""
