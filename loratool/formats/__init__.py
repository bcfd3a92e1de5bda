"""How files spell adapters: every key is container + component + module path + leaf, and each has its own table."""
