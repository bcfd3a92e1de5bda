"""What the names in files mean: which module a key is of, where its weight lies, which model it is for."""
