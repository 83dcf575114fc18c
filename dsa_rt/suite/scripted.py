"""A policy for speed on random weights: which chunks are refined is given, whatever the head says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsa_rt.errors import PolicyError
from dsa_rt.policy import Policy, parse_policy
from dsa_rt.policy.base import Decider, check_run

if TYPE_CHECKING:
    from dsa_rt.policy.calibration import Calibration
    from dsa_rt.policy.targets import Cost

PREFIX = "scripted:"


@dataclass(frozen=True)
class Scripted(Policy):
    """All scheduled passes for the chunks in ``refined`` (indices from 0), one pass for the others. A head is asked
    after the first pass of every chunk, as DSA asks it, where the bundle has one; its answer is not heeded."""

    refined: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "refined", tuple(sorted(set(self.refined))))
        if any(type(chunk) is not int or chunk < 0 for chunk in self.refined):
            raise PolicyError(f"Scripted: refined is {self.refined!r}; expected indices of chunks, from 0")

    @property
    def name(self) -> str:
        """For :func:`suite_policy`; the runtime's own parser does not know it."""
        return PREFIX + ",".join(map(str, self.refined))

    def begin(
        self,
        passes_max: int,
        chunks: int | None,
        calibration: Calibration | None = None,
        *,
        has_head: bool = False,
        cost: Cost | None = None,
    ) -> Decider:
        check_run(passes_max, chunks)
        if chunks is not None and self.refined and self.refined[-1] >= chunks:
            raise PolicyError(f"policy {self.name} refines chunk {self.refined[-1]}, but the clip has {chunks} chunks")
        return ScriptedDecider(passes_max, self.refined, has_head)


class ScriptedDecider(Decider):
    """Looks up its answers."""

    def __init__(self, passes_max: int, refined: Sequence[int], has_head: bool) -> None:
        super().__init__(passes_max)
        self._refined, self._has_head = frozenset(refined), has_head

    def wants_confidence(self, chunk: int, passes: int) -> bool:
        return self._has_head and passes == 1

    def _another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        return chunk in self._refined


def suite_policy(text: str) -> Policy:
    """A policy by name, ``scripted:0,2,5`` among them; :class:`PolicyError` for what is none."""
    if not text.startswith(PREFIX):
        return parse_policy(text)
    try:
        return Scripted(tuple(int(part) for part in text.removeprefix(PREFIX).split(",") if part))
    except ValueError as error:
        raise PolicyError(f"policy {text!r}: expected indices of chunks with commas between them") from error
