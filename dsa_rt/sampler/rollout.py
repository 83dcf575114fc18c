"""Autoregressive few-step sampling, chunk by chunk, under any policy (DSA, Algorithm 1, is one).

A rollout says which pieces its next pass has and takes what the pass gave, so that several can share passes: see
:func:`advance`. The context pass of a chunk, which leaves the K/V of its clean rows for the chunks to come, runs
together with the first pass of the next chunk as one block-causal pass; a clip's last chunk needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from dsa_rt.clock import Clock
from dsa_rt.engine import CONTEXT, Lane, Piece
from dsa_rt.models.wan import Output
from dsa_rt.ops import step as ops
from dsa_rt.policy.base import Decider
from dsa_rt.trace import stage

OnPass = Callable[[int, float | None], None]
OnContext = Callable[[int], None]


@dataclass(frozen=True)
class DenoisedChunk:
    """A chunk before decoding. frames: its latent frames; x0 [1, A, patch_dim] fp32, which lie there until the chunk
    after the next begins; contexts: context passes that ran for it, of the chunk before; milliseconds: of denoise and
    of context passes, once the device has run them."""

    index: int
    frames: range
    x0: Tensor
    passes: int
    confidences: tuple[float | None, ...]
    threshold: float | None
    milliseconds: Callable[[], tuple[float, float]]
    contexts: int = 0


class Rollout:
    """One clip in the making, in a lane of an engine.

    sigmas: the engine's levels. Noise is keyed by seed, token position in the clip and draw (0 for a chunk's start, p
    for the renoising after pass p), so it depends on nothing else.
    """

    def __init__(self, lane: Lane, decider: Decider, seed: int) -> None:
        self.lane, self.decider, self.index = lane, decider, 0
        self.sigmas, self._head = lane.engine.sizes.levels, lane.engine.head
        self._clock = Clock(lane.engine.device)
        self._owed = False  # the context pass of the chunk before
        self._begun = self.judged = False
        self._news: list[tuple[int, float | None] | int] = []
        # Since the last chunk: context passes, and when each pass began and ended, with its share that was context.
        self._contexts, self._times = 0, list[tuple[Any, Any, float]]()
        lane.open(seed)

    @property
    def frames(self) -> range:
        """Latent frames of the chunk in hand."""
        size = self.lane.engine.sizes.chunk
        return range(self.index * size, (self.index + 1) * size)

    @property
    def side(self) -> int:
        return self.index % 2

    def pieces(self) -> list[Piece]:
        """Of the next pass; ``judged`` then says whether the last one needs the hidden states that the head reads."""
        if not self._begun:
            self._begin()
        own = Piece(self.lane, self.side, self._passes)
        self.judged = self._head is not None and self.decider.wants_confidence(self.index, self._passes + 1)
        if self._passes or not self._owed:
            return [own]
        context = Piece(self.lane, 1 - self.side, CONTEXT)
        if self.lane.together(self.side):
            return [context, own]
        self.judged = False
        return [context]

    def _begin(self) -> None:
        self._begun, self._passes = True, 0
        self._confidences: list[float | None] = []
        self._threshold: float | None = None
        self.lane.place(self.side, self.frames)
        ops.philox_normal(self.lane.rows(self.side), self.lane.seed, self.lane.tokens(self.side), 0)

    def take(self, pieces: Sequence[Piece], results: Sequence[Output], began: Any) -> DenoisedChunk | None:
        """What :meth:`pieces` gave in the pass that began at a mark; the chunk, when that was its last."""
        last = pieces[-1]
        if pieces[0].level == CONTEXT:
            self._context_done()
        if last.level == CONTEXT:
            self._times.append((began, self._clock.mark(), 1.0))
            return None
        out, done = results[-1], self._passes + 1
        confidence = self.lane.engine.judge(out.taps) if self.judged else None
        again = self.decider.another_pass(self.index, done, confidence)
        self._threshold = self.decider.threshold if self._threshold is None else self._threshold
        self._confidences.append(confidence)
        rows, lane = self.lane.rows(self.side), self.lane
        following = self.sigmas[done] if again else 0.0
        ops.renoise(
            rows, rows, out.velocity, self.sigmas[done - 1], following, lane.seed, lane.tokens(self.side), done
        )
        self._passes = done
        share = len(pieces[0].span) / sum(len(piece.span) for piece in pieces) if len(pieces) > 1 else 0.0
        self._times.append((began, self._clock.mark(), share))
        self._news.append((done, confidence))
        return None if again else self._finish()

    def _finish(self) -> DenoisedChunk:
        lane, index, side, frames = self.lane, self.index, self.side, self.frames
        lane.remember(side)
        done = DenoisedChunk(
            index, frames, lane.rows(side), self._passes, tuple(self._confidences), self._threshold,
            partial(_milliseconds, self._clock, self._times), self._contexts,
        )  # fmt: skip
        self.index, self._begun, self._owed = index + 1, False, True
        self._contexts, self._times = 0, []
        return done

    def _context_done(self) -> None:
        self._owed = False
        self._contexts += 1
        self._news.append(self.index - 1)

    def tell(self, on_pass: OnPass, on_context: OnContext) -> None:
        """Report what was taken since: passes of the chunk in hand with their confidence, and context passes with the
        index of their chunk. What a report raises leaves the rollout as it is."""
        news, self._news = self._news, []
        for item in news:
            if isinstance(item, int):
                on_context(item)
            else:
                on_pass(*item)

    def write_context(self) -> None:
        """Run the context pass that is owed now, and alone: before the prompt changes."""
        if self._owed:
            with self.lane.engine.working():
                began = self._clock.mark()
                self.lane.engine.run([Piece(self.lane, 1 - self.side, CONTEXT)])
                self._times.append((began, self._clock.mark(), 1.0))
            self._context_done()

    def forget_context(self) -> None:
        """Its K/V have been written otherwise."""
        self._owed = False

    def drop(self) -> None:
        """Begin the chunk in hand again, after a first pass that was launched and is not taken. A context pass that it
        had counts."""
        self._begun = False
        if self._owed:
            self._context_done()


def _milliseconds(clock: Clock, times: Sequence[tuple[Any, Any, float]]) -> tuple[float, float]:
    """Of denoise and context passes; a pass that was both is shared out by rows."""
    spent = [(clock.between(begin, end), share) for begin, end, share in times]
    context = sum(ms * share for ms, share in spent)
    return sum(ms for ms, _ in spent) - context, context


@dataclass(frozen=True)
class Launched:
    """A pass that was started: its rollouts, the pieces and results of each, and when it began."""

    rollouts: Sequence[Rollout]
    pieces: list[list[Piece]]
    results: list[list[Output]]
    began: Any


@torch.no_grad()
def launch(rollouts: Sequence[Rollout]) -> Launched:
    """Start one pass for all of these, which are in lanes of one engine. Nothing else may run in it before
    :func:`take`."""
    engine = rollouts[0].lane.engine
    with engine.working(), stage("pass"):
        pieces = [rollout.pieces() for rollout in rollouts]
        began = Clock(engine.device).mark()
        results = iter(engine.run(list(chain(*pieces)), taps=any(r.judged for r in rollouts)))
        return Launched(rollouts, pieces, [list(islice(results, len(some))) for some in pieces], began)


@torch.no_grad()
def take(launched: Launched) -> list[DenoisedChunk | None]:
    """Decide and renoise; for each rollout the chunk that it finished."""
    parts = zip(launched.rollouts, launched.pieces, launched.results, strict=True)
    with launched.rollouts[0].lane.engine.working(), stage("decide and renoise"):
        return [rollout.take(pieces, results, launched.began) for rollout, pieces, results in parts]


def advance(rollouts: Sequence[Rollout]) -> list[DenoisedChunk | None]:
    """One pass for all of these; for each the chunk that it finished."""
    with rollouts[0].lane.engine.lock:
        return take(launch(rollouts))
