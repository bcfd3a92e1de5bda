"""The version, which the build, the command line and every output's history read."""

from typing import Final

__version__: Final = "0.1.0"
