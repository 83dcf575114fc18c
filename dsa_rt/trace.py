"""Names for a profiler: NVTX ranges around stages, passes and ops.

Off unless asked for, by ``DSA_RT_NVTX=1`` in the environment when this module is imported or by :func:`enable`, and
then made with the package ``nvtx`` (``pip install nvtx``), which hands them to Nsight Systems and other tools that
listen. Off, :func:`stage` returns one shared object that does nothing, in 60 to 90 ns a range (EPYC, Zen 5), with
nothing allocated; :func:`named` leaves a function as it is, for no cost at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from dsa_rt.errors import OptionError

DOMAIN = "dsa_rt"
_T = TypeVar("_T")


class Range(Protocol):
    """What ``with`` takes."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None, /
    ) -> bool | None: ...


class _Nothing:
    """The range of a profiler that is not there. Its methods are built in, take any arguments and return what is
    false, so that an exception goes on: half of what empty functions in Python cost."""

    __slots__ = ()
    __enter__ = __exit__ = "".format


_NOTHING: Any = _Nothing()
_nvtx: Any = None  # the package while ranges are on; one per process, as a profiler is


def stage(name: str) -> Range:
    """A range to enter: ``with stage("denoise"): ...``; it ends where the block does, with an exception too."""
    return _NOTHING if _nvtx is None else _nvtx.annotate(name, domain=DOMAIN)


def push(name: str) -> None:
    """Begin a range in this thread, for :func:`pop` to end; for code that has no block to put it around."""
    if _nvtx is not None:
        _nvtx.push_range(name, domain=DOMAIN)


def pop() -> None:
    """End the range that was last begun in this thread by :func:`push`."""
    if _nvtx is not None:
        _nvtx.pop_range(domain=DOMAIN)


def named(name: str, function: Callable[..., _T]) -> Callable[..., _T]:
    """The function in a range of that name whenever it is called; where ranges are off now, the function itself."""
    if _nvtx is None:
        return function
    made: Callable[..., _T] = _nvtx.annotate(name, domain=DOMAIN)(function)
    return made


def enabled() -> bool:
    """Whether ranges are made."""
    return _nvtx is not None


def enable(on: bool = True) -> None:
    """Make ranges from now on, or stop. :class:`OptionError` where the package ``nvtx`` is not installed."""
    global _nvtx
    if not on:
        _nvtx = None
        return
    try:
        import nvtx
    except ImportError as error:
        raise OptionError(f"NVTX ranges need the package nvtx ({error}): pip install nvtx") from error
    _nvtx = nvtx


if os.environ.get("DSA_RT_NVTX", "0") not in ("", "0"):
    enable()
