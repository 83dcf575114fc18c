"""Runs a decider as a sampler does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsa_rt.policy import Decider


def drive(decider: Decider, confidence: Iterable[Sequence[float]], *, always: bool = False) -> list[int]:
    """Passes of each chunk; confidence[chunk][pass - 1] is handed over where wanted, or always."""
    result = []
    for chunk, levels in enumerate(confidence):
        passes, more = 0, True
        while more:
            passes += 1
            wanted = decider.wants_confidence(chunk, passes)
            more = decider.another_pass(chunk, passes, levels[passes - 1] if wanted or always else None)
        result.append(passes)
    return result
