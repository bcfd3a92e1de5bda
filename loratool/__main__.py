"""`python -m loratool`."""

import os
import sys


def forget_current_folder() -> None:
    """Takes the current folder, which may be a stranger's, off the path of imports: `python -m` puts it first there."""
    # `os` and `sys` were imported when Python started, and loratool has been found by now.
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = ""
    if not sys.flags.safe_path and sys.path[:1] in ([here], [""]):
        del sys.path[0]


forget_current_folder()
sys.argv[0] = __file__
from loratool.cli import main  # noqa: E402

main()
