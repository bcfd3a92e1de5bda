"""Reads, converts, merges, extracts and resizes adapter checkpoints: LoRA and its relatives, in the formats people have.

The public names are those of `__init__.pyi`, each imported when it is first used: looking at files needs no torch.
"""

import lazy_loader

from loratool._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
