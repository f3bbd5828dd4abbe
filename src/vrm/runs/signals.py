"""Signals that ask a process to stop, and what is done when they come."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
"""SIGTERM, SIGUSR1 (which Windows lacks) and SIGINT (Ctrl-C)."""


@contextmanager
def on_stop_signal(function: Callable[[], None]) -> Iterator[None]:
    """Call ``function`` whenever a signal to stop comes; at the end put the earlier handlers back.

    Outside the main thread, which alone may handle signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        function()

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
