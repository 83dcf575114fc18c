"""From what a user states (passes per chunk, model calls, frames per second) to a budget of passes.

All of it is plain arithmetic on what was stated and measured before the run, so a clip's decisions never
depend on a clock. Model calls (NFE) count context passes: sum of passes + one per chunk.
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

    pass_seconds: a denoise pass over one chunk, mean over the clip; context_seconds: a context pass;
    chunk_seconds: what else every chunk takes and nothing hides (decode, head); clip_seconds: once per clip
    (text encoder); frames: pixel frames per chunk, mean over the clip (81 / 7). Work that overlaps with
    passes is not to be counted.
    """

    pass_seconds: float
    context_seconds: float
    chunk_seconds: float
    frames: float
    clip_seconds: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            positive = field.name in ("pass_seconds", "frames")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                expected = "above 0" if positive else "of 0 or more"
                raise PolicyError(f"Cost: {field.name} is {value}; expected a finite number {expected}")

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
    """Passes a policy can spend: ``least`` to ``most`` in a clip, or per chunk where chunks is None."""

    least: float
    most: float
    chunks: int | None
    refine_first: bool

    @classmethod
    def of(cls, passes_max: int, chunks: int | None, *, refine_first: bool) -> Range:
        if chunks is None:
            return cls(1, passes_max, None, refine_first)
        return cls(
            chunks + (passes_max - 1 if refine_first else 0), chunks * passes_max, chunks, refine_first
        )

    @property
    def per_chunk(self) -> tuple[float, float]:
        return self.least / (self.chunks or 1), self.most / (self.chunks or 1)

    def whole(self, budget: float) -> float:
        """Whole passes of a clip; a mean per chunk stays as it is."""
        return budget if self.chunks is None else math.floor(budget + _ROUNDING)

    def check(self, budget: float, target: str, reachable: str) -> float:
        """The budget in whole passes; :class:`PolicyError` where it is out of reach."""
        if self.least <= self.whole(budget) and budget <= self.most + _ROUNDING:
            return self.whole(budget)
        clip = "a session without end" if self.chunks is None else f"a clip of {self.chunks} chunks"
        first = "; its first chunk gets all passes" if self.refine_first and self.chunks else ""
        raise PolicyError(f"{target} cannot be met: {clip} takes {reachable}{first}")


def passes_for_fps(
    fps: float, cost: Cost, passes_max: int, chunks: int | None, *, refine_first: bool = True
) -> float:
    """Mean passes per chunk with which a run reaches at least ``fps``, at most ``passes_max``.

    A speed below that of a dense run is met by all passes. :class:`PolicyError` with the reachable range
    where even the fewest passes are too slow.
    """
    span = Range.of(passes_max, chunks, refine_first=refine_first)
    least, most = span.per_chunk
    reachable = (
        f"{cost.fps(most, chunks):.4g} to {cost.fps(least, chunks):.4g} frames per second on this machine"
    )
    passes = min(cost.passes(fps, chunks), most)
    span.check(passes * (chunks or 1), f"fps={fps:g}", reachable)
    return passes


def clip_budget(
    passes_max: int,
    chunks: int | None,
    *,
    refine_first: bool = True,
    passes_per_chunk: float | None = None,
    model_calls: float | None = None,
    fps: float | None = None,
    cost: Cost | None = None,
) -> float:
    """Passes a whole clip may spend (a whole number), or the mean per chunk of a session without end.

    One target at most; none: :data:`DEFAULT_SHARE` of a dense run's model calls, or what can be reached
    nearest to it. :class:`PolicyError` naming the reachable range where a target lies outside.
    """
    span = Range.of(passes_max, chunks, refine_first=refine_first)
    if fps is not None:
        if cost is None:
            raise PolicyError(
                f"fps={fps:g} needs measured times: state passes= or calls=, or compile with a cost"
            )
        passes = passes_for_fps(fps, cost, passes_max, chunks, refine_first=refine_first)
        return span.whole(passes * (chunks or 1))
    if passes_per_chunk is not None:
        least, most = map(_up, span.per_chunk)
        reachable = f"{least} to {most} passes per chunk"
        return span.check(passes_per_chunk * (chunks or 1), f"passes={passes_per_chunk:g}", reachable)
    if model_calls is not None:
        if chunks is None:
            raise PolicyError(
                f"calls={model_calls:g} is a target per clip; a session without end needs passes= or fps="
            )
        reachable = f"{span.least + chunks:g} to {span.most + chunks:g} model calls, context passes counted"
        return span.check(model_calls - chunks, f"calls={model_calls:g}", reachable)
    share = DEFAULT_SHARE * (passes_max + 1) - 1
    return min(max(span.whole(share * (chunks or 1)), span.least), span.most)


def _up(value: float) -> str:
    """Two decimals, rounded up: asking for what a message names must work."""
    return f"{math.ceil(value * 100 - _ROUNDING) / 100:g}"
