"""How files spell adapters: every key is container + component + module path + leaf, and metadata says the rest.

- `leaves`: which leaf the end of a key spells, and what each family of formats calls its leaves.
- `recognise`: which tool made a file, and which layouts are refused.
- `peft`: PEFT's adapter_config.json as it is read.
- `table`: the formats that can be written, a row each.
- `peft_writer`, `kohya`, `modelspec`: the config and the metadata that are written.
- `consumers`: the programs that load adapters, and what each of them reads.
"""
