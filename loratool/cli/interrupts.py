"""Signals and standard streams of the program, from its very first moment: nothing else is imported before."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from types import FrameType
from typing import Final, NoReturn

IMPORTER: Final = "<frozen importlib"
"""How the files of the frames begin in which Python imports a module."""
SOON: Final = 0.05
"""Seconds after which an interruption that came while a module was imported is tried again."""


def prepare_program() -> None:
    """Sets the signals' handlers, and opens standard streams that are closed."""
    # As a program only: whoever imports the command line has handlers of their own.
    if os.path.basename(sys.argv[0]) in ("loratool", "loratool.exe", "__main__.py", "-m"):
        _open_streams()
        signal.signal(signal.SIGINT, _interrupt)
        # SIGTERM and SIGHUP unwind like exceptions, so that outputs are tidied up. Windows has no SIGHUP.
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _terminate)


def _open_streams() -> None:
    """Gives the three standard streams a place to go where they were closed: the first file that is opened would get their
    numbers, and what is printed would go into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORTER):
            return True
        frame = frame.f_back
    return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    # torch and numpy swallow an exception that comes while they are imported, or show it as a failure of their own.
    if _is_importing(frame):
        again = threading.Timer(SOON, _thread.interrupt_main)
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
