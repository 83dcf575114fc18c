"""What a policy is: an object that sees confidences and answers "another pass?".

A :class:`Policy` is a frozen description a user states once; :meth:`Policy.begin` makes a :class:`Decider`,
which lives for one clip of one sample. The sampler drives every decider in the same way and does not know
which it has::

    for chunk in range(chunks):
        passes = 0
        while True:
            run a pass; passes += 1
            confidence = head if decider.wants_confidence(chunk, passes) else None
            if not decider.another_pass(chunk, passes, confidence):
                break

``another_pass`` is asked after every pass, the last scheduled one included (the answer is then False), so
that a decider sees what it must remember. Chunks count from 0, passes from 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsa_rt.errors import PolicyError

if TYPE_CHECKING:
    from dsa_rt.policy.calibration import Calibration
    from dsa_rt.policy.targets import Cost


@dataclass(frozen=True)
class Policy(ABC):
    """How much is computed. Equal policies decide equally; none changes after construction.

    Policies of chunks answer in :meth:`begin`. :class:`dsa_rt.policy.HSA`, which allocates steps to tokens of a whole
    clip, refuses there and answers in its ``plan``.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The text that :func:`dsa_rt.policy.parse_policy` turns back into an equal policy."""

    @property
    def needs_cost(self) -> bool:
        """Whether :meth:`begin` needs measured seconds (a target in frames per second)."""
        return False

    @abstractmethod
    def begin(
        self,
        passes_max: int,
        chunks: int | None,
        calibration: Calibration | None = None,
        *,
        has_head: bool = False,
        cost: Cost | None = None,
    ) -> Decider:
        """A decider for one clip of ``chunks`` chunks (None: a session without end) and ``passes_max``
        scheduled passes.

        calibration: the bundle's, where it has one. has_head: whether the model can give confidences. cost:
        seconds measured at compile, only read where :attr:`needs_cost`. Raises :class:`PolicyError` where the
        policy does not fit the model or its target cannot be met, and says what to do.
        """


class Decider(ABC):
    """The decisions of one clip. Same confidences, same answers: no clock, no randomness.

    threshold: what the last confidence handed to :meth:`another_pass` was compared with (refined if below
    it), None where the answer did not depend on it.
    """

    threshold: float | None = None

    def __init__(self, passes_max: int) -> None:
        self.passes_max = passes_max
        self._next = (0, 1)

    @abstractmethod
    def wants_confidence(self, chunk: int, passes: int) -> bool:
        """Whether the head should run on pass ``passes`` of the chunk, which has just ended."""

    @abstractmethod
    def _another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        """The rule itself; an answer at ``passes_max`` is ignored."""

    def another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        """Whether the chunk gets another pass after ``passes``; confidence [0, 1] where it was wanted.

        Raises :class:`PolicyError` for a confidence that is not a number in [0, 1] or was wanted and is
        missing; RuntimeError when passes are reported in another order than they can run in (a fault of the
        sampler).
        """
        chunk_now, passes_now = self._next
        if (chunk, passes) != (chunk_now, passes_now):
            raise RuntimeError(
                f"pass {passes} of chunk {chunk} reported; expected pass {passes_now} of chunk {chunk_now}"
            )
        if confidence is None:
            if self.wants_confidence(chunk, passes):
                raise PolicyError(
                    f"the policy needs a confidence after pass {passes} of chunk {chunk}, but none came"
                )
        elif not 0.0 <= confidence <= 1.0:  # also refuses NaN
            raise PolicyError(
                f"the confidence of chunk {chunk} after pass {passes} is {confidence}; expected 0 to 1: "
                "the confidence head or its input is damaged"
            )
        self.threshold = None
        answer = self._another_pass(chunk, passes, confidence) and passes < self.passes_max
        self._next = (chunk, passes + 1) if answer else (chunk + 1, 1)
        return answer


def check_run(passes_max: int, chunks: int | None) -> None:
    """:class:`PolicyError` unless there is at least one pass and one chunk."""
    if passes_max < 1:
        raise PolicyError(f"{passes_max} passes are scheduled; a policy needs 1 or more")
    if chunks is not None and chunks < 1:
        raise PolicyError(
            f"a clip of {chunks} chunks; a policy needs 1 or more (or None for a session without end)"
        )
