"""How a program that imports Accord ends."""

from __future__ import annotations

import atexit
import ctypes
import sys


def end_without_destructors() -> None:
    """From now on this process ends, once Python has ended, without the destructors of C++
    libraries, as Accord's commands do; its exit code and its output stay what they are.

    For libraries whose threads go on until then. Without effect where the C library has no
    ``on_exit`` (it is glibc's).
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "on_exit"):
        atexit.register(_skip_what_was_registered_before)


def _skip_what_was_registered_before() -> None:
    library = ctypes.CDLL(None)
    library.fflush(None)
    # The last function registered is the first called, with the exit code: the process ends there.
    library.on_exit(library._exit, None)
