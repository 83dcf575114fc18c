"""dsa_rt: the same video-diffusion weights, adaptive compute, one compiled call.

    runtime = dsa_rt.load("demo")
    generate = runtime.compile(policy="dsa")
    video = generate("a red square bouncing, a blue circle at rest", seed=0)
    video.save("clip.mp4")

Names are imported when they are first used, so that ``import dsa_rt`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsa_rt.errors import (
        BundleError,
        Cancelled,
        DsaRtError,
        MemoryLimitError,
        OptionError,
        OutputError,
        PolicyError,
        PromptError,
        ShapeError,
    )
    from dsa_rt.exporting import export
    from dsa_rt.generate import Generate
    from dsa_rt.media import Video
    from dsa_rt.pipelines.attach import attach, attached, detach
    from dsa_rt.policy import DSA, HSA, Fixed
    from dsa_rt.progress import Event
    from dsa_rt.runtime import Runtime, load
    from dsa_rt.session import Chunk, Session
    from dsa_rt.stats import Stats

__version__ = "0.1.0"

_HOMES = {
    "BundleError": "errors", "Cancelled": "errors", "DsaRtError": "errors", "MemoryLimitError": "errors",
    "OptionError": "errors", "OutputError": "errors", "PolicyError": "errors", "PromptError": "errors",
    "ShapeError": "errors", "export": "exporting", "Chunk": "session", "Generate": "generate", "Session": "session",
    "Video": "media", "DSA": "policy", "HSA": "policy", "Fixed": "policy", "Event": "progress", "Runtime": "runtime",
    "load": "runtime", "Stats": "stats", "attach": "pipelines.attach", "attached": "pipelines.attach",
    "detach": "pipelines.attach",
}  # fmt: skip

__all__ = [
    "DSA", "HSA", "BundleError", "Cancelled", "Chunk", "DsaRtError", "Event", "Fixed", "Generate", "MemoryLimitError",
    "OptionError", "OutputError", "PolicyError", "PromptError", "Runtime", "Session", "ShapeError", "Stats", "Video",
    "__version__", "attach", "attached", "detach", "export", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"dsa_rt.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dsa_rt' has no attribute {name!r}")
