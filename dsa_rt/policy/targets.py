"""From what a user states (passes per chunk, model calls, frames per second) to a budget of passes.

All of it is plain arithmetic on what was stated and measured before the run, so a clip's decisions never depend on a
clock. Model calls (NFE) count context passes: sum of passes + one per chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dsa_rt.errors import PolicyError

DEFAULT_SHARE = 0.7
"""Of a dense run's model calls, where no target is stated: 24.5 of 35 for 7 chunks and 4 passes."""

_ROUNDING = 1e-9  # so that 17 / 7 passes per chunk are 17 passes in 7 chunks


@dataclass(frozen=True)
class Cost:
    """Seconds of one clip's parts, measured at compile.

    pass_seconds: a denoise pass over one chunk, mean over the clip; context_seconds: a context pass; chunk_seconds:
    what else every chunk takes and nothing hides (decode, head); clip_seconds: once per clip (text encoder); frames:
    pixel frames per chunk, mean over the clip (81 / 7). Work that overlaps with passes is not to be counted.
    """

    pass_seconds: float
    context_seconds: float
    chunk_seconds: float
    frames: float
    clip_seconds: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name not in ("pass_seconds", "frames") else math.ulp(0.0)
            if not (math.isfinite(value) and value >= least):
                raise PolicyError(f"Cost: {field.name} is {value}; expected a finite number of {'0 or more' if least == 0 else 'more than 0'}")

    def fps(self, passes: float, chunks: int | None) -> float:
        """Frames per second at a mean number of passes per chunk."""
        return self.frames / (self.pass_seconds * passes + self._besides(chunks))

    def _besides(self, chunks: int | None) -> float:
        """Seconds per chunk outside denoise passes; in a session without end the clip's own part vanishes."""
        return self.context_seconds + self.chunk_seconds + (self.clip_seconds / chunks if chunks else 0.0)

    def passes(self, fps: float, chunks: int | None) -> float:
        """Mean passes per chunk that take exactly ``frames / fps`` seconds; may be negative."""
        return (self.frames / fps - self._besides(chunks)) / self.pass_seconds


@dataclass(frozen=True)
class Range:
    """Passes a policy can spend: ``least`` to ``most`` in a clip, or on average per chunk where chunks is None."""

    least: float
    most: float
    chunks: int | None

    @classmethod
    def of(cls, passes_max: int, chunks: int | None, *, refine_first: bool) -> Range:
        if chunks is None:
            return cls(1, passes_max, None)
        return cls(chunks + (passes_max - 1 if refine_first else 0), chunks * passes_max, chunks)

    @property
    def per_chunk(self) -> tuple[float, float]:
        return self.least / (self.chunks or 1), self.most / (self.chunks or 1)

    def __str__(self) -> str:
        return "a session without end" if self.chunks is None else f"a clip of {self.chunks} chunks"


def passes_for_fps(fps: float, cost: Cost, passes_max: int, chunks: int | None, *, refine_first: bool = True) -> float:
    """Mean passes per chunk with which a run reaches at least ``fps``, at most ``passes_max``.

    A speed below that of a dense run is met by all passes. :class:`PolicyError` with the reachable range where even
    the fewest passes are too slow.
    """
    span = Range.of(passes_max, chunks, refine_first=refine_first)
    least, most = span.per_chunk
    passes = min(cost.passes(fps, chunks), most)
    if passes < least - _ROUNDING:
        raise PolicyError(
            f"fps={fps:g} cannot be met: {span} runs at {cost.fps(most, chunks):.4g} to {cost.fps(least, chunks):.4g} "
            f"frames per second here ({_range(most)} to {_range(least)} passes per chunk); ask for less, or for a "
            "smaller size"
        )
    return passes


def clip_budget(
    passes_max: int,
    chunks: int | None,
    *,
    refine_first: bool,
    passes_per_chunk: float | None = None,
    model_calls: float | None = None,
    fps: float | None = None,
    cost: Cost | None = None,
) -> float:
    """Passes a whole clip may spend (a whole number), or the mean per chunk of a session without end.

    At most one target; none: :data:`DEFAULT_SHARE` of a dense run's model calls, or what can be reached nearest to it.
    :class:`PolicyError` naming the reachable range where a target lies outside.
    """
    span = Range.of(passes_max, chunks, refine_first=refine_first)
    if fps is not None:
        if cost is None:
            raise PolicyError(f"fps={fps:g} needs measured times; compile measures them, or state passes= or calls=")
        budget = passes_for_fps(fps, cost, passes_max, chunks, refine_first=refine_first) * (chunks or 1)
    elif passes_per_chunk is not None:
        budget = passes_per_chunk * (chunks or 1)
        if not span.least - _ROUNDING <= _whole(budget, chunks) <= span.most or budget > span.most + _ROUNDING:
            least, most = span.per_chunk
            raise _unreachable(f"passes={passes_per_chunk:g}", span, f"{_range(least)} to {_range(most)} passes per chunk", refine_first)
    elif model_calls is not None:
        if chunks is None:
            raise PolicyError(f"calls={model_calls:g} is a target per clip; a session without end needs passes= or fps=")
        budget = model_calls - chunks
        if _whole(budget, chunks) < span.least or budget > span.most + _ROUNDING:
            calls = f"{span.least + chunks:g} to {span.most + chunks:g} model calls, context passes counted"
            raise _unreachable(f"calls={model_calls:g}", span, calls, refine_first)
    else:
        share = DEFAULT_SHARE * (passes_max + 1) - 1
        budget = min(max(_whole(share * (chunks or 1), chunks), span.least), span.most)
    return _whole(budget, chunks)


def _whole(budget: float, chunks: int | None) -> float:
    return budget if chunks is None else math.floor(budget + _ROUNDING)


def _range(value: float) -> str:
    return f"{math.ceil(value * 100) / 100:g}"  # rounded up: asking for what the message names must work


def _unreachable(target: str, span: Range, reachable: str, refine_first: bool) -> PolicyError:
    first = ", of which the first chunk always gets all" if refine_first and span.chunks else ""
    return PolicyError(f"{target} cannot be met: {span} takes {reachable}{first}")
