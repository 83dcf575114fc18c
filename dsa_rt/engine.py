"""What a compiled autoregressive function runs on: K/V, rows and prompts of its lanes, and recorded passes over them.

A lane holds one clip in the making: a ring of K/V, two sides of rows, which chunks take in turns, and the prompt's K/V.
A pass is a list of pieces, each one side of one lane at one noise level, and is one forward pass over the rows of all
of them: a chunk's context pass with the first pass of the next (block-causal), or pieces of clips that are at different
chunks and passes. Every piece attends to the rows of its own lane that its chunk sees, and to its own prompt.

All buffers are made with the engine, or at the first run of each kind of pass, which compile does. Rows lie where they
are computed: noise is drawn into a side, each pass renoises it in place, the last leaves the clean chunk there, and the
context pass reads that.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsa_rt.arena import Arena
from dsa_rt.cache import Ring, TextKV
from dsa_rt.models.confidence import ConfidenceHead
from dsa_rt.models.wan import Output, WanModel
from dsa_rt.ops import step as ops
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens, rope_axes, rope_table
from dsa_rt.recording import Recorded, Recorder, record
from dsa_rt.schedule import TRAIN_TIMESTEPS

CONTEXT = -1
"""The level of a context pass: timestep 0."""


@dataclass(frozen=True)
class Sizes:
    """Of an engine, in latent frames. chunk: of a chunk; window, sink, places: see :class:`dsa_rt.cache.Ring`; lanes:
    clips side by side; levels: sigma of each scheduled pass."""

    grid: TokenGrid
    chunk: int
    window: int
    sink: int
    places: int
    levels: tuple[float, ...]
    lanes: int = 1


@dataclass(frozen=True, eq=False)
class Piece:
    """One side of one lane in a pass. level: which of the scheduled noise levels, or CONTEXT."""

    lane: Lane
    side: int
    level: int

    @property
    def span(self) -> range:
        """Its rows among all rows of the engine."""
        return self.lane.span(self.side)


class Lane:
    """The state of one clip in an engine's buffers. Sides are 0 and 1, chunks take them in turns."""

    def __init__(self, engine: Engine, number: int, text: TextKV) -> None:
        sizes = engine.sizes
        self.engine, self.number, self.text = engine, number, text
        self.ring = Ring(sizes.window, sizes.sink, sizes.places)
        self.segments = torch.zeros(2, 5, dtype=torch.int64)
        self._frames = [range(0), range(0)]
        self._first = number * 2 * engine.chunk_tokens
        self._base = number * sizes.places * sizes.grid.tokens

    def open(self, seed: int) -> None:
        """Begin a clip."""
        self.ring.restart(0)
        self.engine.seeds[self.number] = seed

    def span(self, side: int) -> range:
        """The rows of a side among all rows of the engine."""
        start = self._first + side * self.engine.chunk_tokens
        return range(start, start + len(self._frames[side]) * self.engine.sizes.grid.tokens)

    def rows(self, side: int) -> Tensor:
        """[1, A, patch_dim] fp32 of the chunk on a side: noisy, or clean once it is done."""
        span = self.span(side)
        return self.engine.rows[:, span.start : span.stop]

    def tokens(self, side: int) -> Tensor:
        """[A] int64: the tokens' numbers in the clip, by which noise is keyed."""
        span = self.span(side)
        return self.engine.tokens[span.start : span.stop]

    @property
    def seed(self) -> Tensor:
        """[1] int64."""
        return self.engine.seeds[self.number : self.number + 1]

    def place(self, side: int, frames: range) -> None:
        """Give a side to these latent frames, a chunk or less: their positions, cache rows and what they attend to."""
        engine, per_frame = self.engine, self.engine.sizes.grid.tokens
        places = self.ring.written(frames)
        self._frames[side] = frames
        inside = torch.arange(per_frame)
        span = self.span(side)
        rows = slice(span.start, span.stop)
        slots = torch.cat([self._base + place * per_frame + inside for place in places])
        engine.slots[rows].copy_(slots, non_blocking=True)
        engine.tokens[rows].copy_(torch.arange(frames.start * per_frame, frames.stop * per_frame), non_blocking=True)
        positions = torch.tensor([[frame, 0, 0] for frame in frames])
        turning = rope_axes(engine.model.config.head_dim)[0]  # the columns of a table that depend on the frame
        made = rope_table(positions, engine.model.config.head_dim)
        for table, column in zip((engine.cos, engine.sin), made, strict=True):
            column = column[:, None, :turning].to(table.device, non_blocking=True)
            table[rows].unflatten(0, (len(frames), per_frame))[:, :, :turning] = column
        ends = [self._base + place * per_frame for pair in self.ring.seen(frames.stop) for place in pair]
        self.segments[side] = torch.tensor([len(span), *ends, 0, 0][:5])

    def together(self, side: int) -> bool:
        """Whether the chunk on a side can run with the context pass of the one before it: it takes no cache rows that
        the other still attends to."""
        sizes = self.engine.sizes
        taken = set(self.ring.written(self._frames[side]))
        ranges = self.ring.seen(self._frames[1 - side].stop)
        return sizes.places > sizes.window or not any(begin <= place < end for begin, end in ranges for place in taken)

    def remember(self, side: int) -> None:
        """Keep the clean rows of a side, for :meth:`clean`."""
        frames = self._frames[side]
        rows = self.rows(side)[0].unflatten(0, (len(frames), -1))
        for frame, clean in zip(frames, rows, strict=True):
            self.engine.clean[self.number, self.ring.place(frame)] = clean

    def clean(self, frames: range) -> Tensor:
        """[1, A, patch_dim]: clean rows of frames in the cache, in new memory."""
        return torch.cat([self.engine.clean[self.number, self.ring.place(frame)] for frame in frames])[None]


class Engine:
    """See the module. One thread runs in it at a time: hold ``lock`` from :meth:`run` to the last use of its result,
    and write rows and prompts of its lanes in :meth:`working` alone."""

    def __init__(
        self, model: WanModel, head: ConfidenceHead | None, sizes: Sizes, device: torch.device,
        recorder: Recorder = record,
    ) -> None:  # fmt: skip
        config, tokens = model.config, sizes.grid.tokens
        self.model, self.head, self.sizes, self.device = model, head, sizes, device
        self.lock = threading.RLock()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.chunk_tokens = sizes.chunk * tokens
        self.arena = Arena(device)
        self.passes: dict[tuple[object, ...], tuple[Recorded, list[Output]]] = {}
        self.judgements: dict[tuple[object, ...], Recorded] = {}
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._record = partial(recorder, device, pool=pool)
        # A graph of a device has what the host read while it was captured; what the CPU replays is read again.
        self.bakes = device.type == "cuda"
        self._confidence, self._one = torch.zeros(1, device=device), torch.ones(1, device=device)
        self._refine = torch.zeros(1, dtype=torch.bool, device=device)
        count = sizes.lanes * 2 * self.chunk_tokens
        self.rows = torch.zeros(1, count, config.patch_dim, device=device)
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.slots = torch.zeros(count, dtype=torch.int64, device=device)
        self.levels = torch.zeros(count, dtype=torch.int64, device=device)
        self._levels: list[int] = [0] * (2 * sizes.lanes)
        self._segments = torch.zeros(2, 2 * sizes.lanes, 5, dtype=torch.int64)  # of shared passes, and of their text
        still = frame_tokens(sizes.grid, range(2 * sizes.chunk), config.head_dim, per_frame=False)
        self.cos, self.sin = (table.repeat(sizes.lanes, 1).to(device) for table in (still.cos, still.sin))
        self.seeds = torch.zeros(sizes.lanes, dtype=torch.int64, device=device)
        self.clean = torch.zeros(sizes.lanes, sizes.places, tokens, config.patch_dim, device=device)
        shape = (1, sizes.lanes * sizes.places * tokens, config.heads, config.head_dim)
        self.cache = PooledKV(config.layers, shape, model.dtype, device)
        with torch.no_grad():
            timesteps = TRAIN_TIMESTEPS * torch.tensor([[*sizes.levels, 0.0]], device=device)
            self.tables = model.modulation(timesteps)
        length = config.text_length
        shape = (1, sizes.lanes * length, config.heads, config.head_dim)
        self.text = TextKV.room(config.layers, shape, model.dtype, device)

    @contextmanager
    def working(self) -> Iterator[None]:
        """This thread's turn; on CUDA the engine's own stream, after what is in the current one."""
        with self.lock:
            if self.stream is None:
                yield
                return
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                yield

    def lanes(self) -> list[Lane]:
        """For one caller: a lane keeps its engine alive, not the other way round."""
        length = self.model.config.text_length
        return [Lane(self, number, _part(self.text, number, length)) for number in range(self.sizes.lanes)]

    @torch.no_grad()
    def read_prompt(self, lane: Lane, rows: Tensor) -> None:
        """Text K/V of a lane, from rows [1, text_length, text_dim] of the text encoder."""
        self.model.embed_text(rows, out=lane.text)

    @torch.no_grad()
    def warm_up(self, lanes: Sequence[Lane], chunks: int, *, judged: bool) -> None:
        """Run and record every kind of pass of a clip, those with most rows first. judged: whether the head will be
        asked."""
        judged = judged and self.head is not None
        taps = [True, False] if judged else [False]
        for lane in lanes:
            lane.open(0)
        for count in range(len(lanes), 1, -1):  # both sides of each, then one
            self._visit(lanes[:count], 0, taps)
        for lane in lanes:
            # What a graph holds of the ring repeats once it has gone round; before that chunks see more and more.
            around = self.sizes.places // math.gcd(self.sizes.places - self.sizes.sink, self.sizes.chunk)
            cycle = min(chunks, self.sizes.places + around) if self.bakes else 1
            for chunk in range(cycle):
                self._visit([lane], chunk, taps)
        for lane in lanes:
            lane.open(0)
        self.arena.allocations = 0

    def _visit(self, lanes: Sequence[Lane], chunk: int, taps: Sequence[bool]) -> None:
        """The passes of a chunk and the first one of the next."""
        size = self.sizes.chunk
        for lane in lanes:
            for index in (chunk, chunk + 1):
                lane.place(index % 2, range(index * size, (index + 1) * size))
        old, new = ([Piece(lane, (chunk + n) % 2, 0) for lane in lanes] for n in (0, 1))
        together = all(lane.together((chunk + 1) % 2) for lane in lanes)
        for with_taps in taps:
            # Together: chunks at their first pass; some of them: the others are further. Alone: each side.
            some = [[*old, *new[less:]] for less in range(len(lanes))] if together else []
            for pieces in (*some, old, new):
                for out in self.run(pieces, taps=with_taps):
                    if with_taps:
                        self.judge(out.taps)

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece], *, taps: bool = False) -> list[Output]:
        """One pass over all pieces: of each its velocity [1, A, P] and, with ``taps``, the hidden states that the
        confidence head reads. They lie in working memory: the next pass overwrites them."""
        for piece in pieces:
            self._set_level(piece)
        lane, spans = pieces[0].lane, [piece.span for piece in pieces]
        start, stop = min(s.start for s in spans), max(s.stop for s in spans)
        adjacent = stop - start == sum(map(len, spans)) and all(piece.lane is lane for piece in pieces)
        if adjacent:
            out = self._alone(lane, range(start, stop), sorted(piece.side for piece in pieces), taps)
            return [_rows(out, s.start - start, s.stop - start) for s in spans]
        out, results, begin = self._side_by_side(pieces, taps), [], 0
        for span in spans:
            results.append(_rows(out, begin, begin + len(span)))
            begin += len(span)
        return results

    @torch.no_grad()
    def judge(self, taps: Sequence[Tensor]) -> float:
        """The head's confidence, from what :meth:`run` gave for one piece. The one place where the host waits for the
        device within a chunk."""
        assert self.head is not None
        where = ("judge", *(tap.data_ptr() for tap in taps), taps[0].shape[1])
        if where in self.judgements:
            self.judgements[where].replay()
        else:
            judge = self._judge(taps)
            judge()  # makes the buffers that are still missing
            self.judgements[where] = self._record(judge)
        return float(self._confidence[0])

    def _judge(self, taps: Sequence[Tensor]) -> Callable[[], None]:
        head, arena, confidence, refine, one = self.head, self.arena, self._confidence, self._refine, self._one
        assert head is not None

        def judge() -> None:
            # Which threshold applies is the decider's business; the op serves the sigmoid.
            ops.exit_decision(refine, confidence, head.judge(taps, arena), one)

        return judge

    def _set_level(self, piece: Piece) -> None:
        level = piece.level % (len(self.sizes.levels) + 1)
        number = 2 * piece.lane.number + piece.side
        if self._levels[number] != level:
            start = number * self.chunk_tokens
            self.levels[start : start + self.chunk_tokens] = level
            self._levels[number] = level

    def _alone(self, lane: Lane, span: range, sides: Sequence[int], taps: bool) -> Output:
        """One or both sides of a lane, where they are."""
        segments = lane.segments[sides[0] : sides[-1] + 1]
        rows = slice(span.start, span.stop)
        active = ActiveSet(
            self.tokens[rows], self.cos[rows], self.sin[rows], self.levels[rows], self.slots[rows], segments=segments
        )
        return self._replayed((span, taps), self.rows[:, rows], active, lane.text, taps)

    def _side_by_side(self, pieces: Sequence[Piece], taps: bool) -> Output:
        """Pieces of several lanes, their rows brought together."""
        count, length = sum(len(piece.span) for piece in pieces), self.model.config.text_length
        whole = {"rows": self.rows[0], "cos": self.cos, "sin": self.sin, "levels": self.levels, "slots": self.slots}
        picked = {
            name: self.arena.get(f"picked {name}", (count, *source.shape[1:]), source.dtype)
            for name, source in whole.items()
        }
        begin = 0
        for number, piece in enumerate(pieces):
            span, end = piece.span, begin + len(piece.span)
            for name, source in whole.items():
                picked[name][begin:end] = source[span.start : span.stop]
            begin, text = end, piece.lane.number * length
            self._segments[0, number] = piece.lane.segments[piece.side]
            self._segments[1, number] = torch.tensor([len(span), text, text + length, 0, 0])
        segments, texts = self._segments[:, : len(pieces)]
        active = ActiveSet(
            picked["slots"],  # in place of token numbers, which the model does not read
            picked["cos"], picked["sin"], picked["levels"], picked["slots"], segments=segments, text_segments=texts,
        )  # fmt: skip
        return self._replayed((count, len(pieces), taps), picked["rows"][None], active, self.text, taps)

    def _replayed(
        self, kind: tuple[object, ...], rows: Tensor, active: ActiveSet, text: TextKV, taps: bool
    ) -> Output:
        """A kind of pass over buffers that are always the same for it: recorded at first."""
        assert active.segments is not None
        if self.bakes:
            kind += tuple(active.segments.flatten().tolist())
        if kind in self.passes:
            recorded, made = self.passes[kind]
            recorded.replay()
            return made[0]
        made = []
        forward = self._forward(rows, active, text, taps, made)
        forward()  # makes the buffers that are still missing
        # A part of a chunk, when a prompt changes, and baked company do not come again soon.
        passing = rows.shape[1] % self.chunk_tokens or (self.bakes and active.text_segments is not None)
        if not passing:
            self.passes[kind] = self._record(forward), made
        return made[0]

    def _forward(
        self, rows: Tensor, active: ActiveSet, text: TextKV, taps: bool, made: list[Output]
    ) -> Callable[[], None]:
        """The pass, with its result in ``made``; without a reference to this engine, which may hold it."""
        chosen = self.head.config.taps if taps and self.head is not None else ()
        model, tables, cache, arena = self.model, self.tables, self.cache, self.arena

        def forward() -> None:
            made[:] = [model(rows, active, tables, text, cache, chosen, arena)]

        return forward


class PooledKV:
    """Self-attention K/V of all lanes [1, lanes * places * tokens, H, D], by layer; an active set says by its segments
    which of its tokens attend to which rows."""

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.k[layer], self.v[layer], active.slots

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor]:
        return self.k[layer], self.v[layer]


def _part(text: TextKV, number: int, length: int) -> TextKV:
    rows = slice(number * length, (number + 1) * length)
    return TextKV([(k[:, rows], v[:, rows]) for k, v in text.layers])


def _rows(out: Output, start: int, stop: int) -> Output:
    return Output(out.velocity[:, start:stop], [tap[:, start:stop] for tap in out.taps])
