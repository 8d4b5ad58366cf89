"""Signal handlers that outlast what libraries do to them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """SIGINT and SIGTERM do afterwards what they did before, whatever is called within."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, so none can be changed here
        return
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
