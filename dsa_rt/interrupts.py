"""Ctrl-C and SIGTERM for the command line: raised where they arrive, but not inside a loading module."""

from __future__ import annotations

import importlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop."""


@contextmanager
def interruptible(received: list[int]) -> Iterator[None]:
    """Turns SIGINT and SIGTERM into Interrupted, and notes them in `received` as libraries may disguise it.

    A Ctrl-C repeated within a second is ignored: the first is obeyed, temporary files are being removed.
    Signals that the parent process ignores stay ignored. Outside the main thread they are the embedder's.
    """
    last = -1.0

    def stop(number: int, _: object) -> None:
        nonlocal last
        received.append(number)
        if time.monotonic() - last > 1:
            last = time.monotonic()
            raise Interrupted

    try:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in heard}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_modules(*names: str) -> None:
    """Imports modules while signals wait: an exception in the start of a C++ module can abort the process."""
    mask = getattr(signal, "pthread_sigmask", None)
    before = mask(signal.SIG_BLOCK, SIGNALS) if mask else None
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)
