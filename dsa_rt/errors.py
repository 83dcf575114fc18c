"""Every error a user can cause, as one small family.

A message names the value that was wrong, what was expected and what to do about it. The command line prints
the message alone; embedders catch :class:`DsaRtError` or the built-in class that each error also is.
"""

from __future__ import annotations


class DsaRtError(Exception):
    """Base of all errors raised on purpose by dsa_rt."""


class OptionError(DsaRtError, ValueError):
    """An argument or option has a value that cannot be used."""


class ShapeError(OptionError):
    """A size does not divide, or a tensor has another shape, dtype, stride or device than needed."""


class PolicyError(OptionError):
    """An unknown policy, or one that does not fit the model it should drive."""


class PromptError(OptionError):
    """A prompt the text encoder does not understand or that is too long."""


class BundleError(DsaRtError, ValueError):
    """A bundle that is damaged, incomplete, unsafe or of an unknown version."""


class OutputError(DsaRtError, OSError):
    """A file or folder that cannot be written."""


class MemoryLimitError(DsaRtError, MemoryError):
    """The memory plan does not fit; the message says how much is needed and which setting lowers it."""


class Cancelled(DsaRtError):
    """The caller asked a running generation to stop."""
