"""One clip being made: chunks on demand, and prompts that change between them."""

from __future__ import annotations

import hashlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event as CancelFlag
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsa_rt.clock import Clock
from dsa_rt.engine import CONTEXT, Piece
from dsa_rt.errors import Cancelled, OptionError, PromptError
from dsa_rt.ops import backend
from dsa_rt.policy import StepPlan
from dsa_rt.policy.base import Decider
from dsa_rt.progress import Event, EventKind
from dsa_rt.sampler.conditions import Conditions, image_conditions
from dsa_rt.sampler.rollout import DenoisedChunk, Launched, Rollout, launch, take
from dsa_rt.stats import ChunkStats, Stats, frames_sha256, peak_memory
from dsa_rt.trace import stage

if TYPE_CHECKING:
    from dsa_rt.generate import Generate

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Chunk:
    """What a stream hands out. frames [t, H, W, 3] uint8; latents [C, f, h, w] fp32; stats: what it cost."""

    index: int
    frames: Tensor
    latents: Tensor
    stats: ChunkStats

    @property
    def passes(self) -> int:
        return self.stats.passes

    @property
    def confidences(self) -> tuple[float | None, ...]:
        return self.stats.confidences


class Session:
    """One clip being made. Iterate, or call :meth:`next_chunk`; :meth:`set_prompt` between chunks.

    ``chunks`` is the clip's length in chunks, None without end. Made by :class:`Generate`.
    """

    def __init__(
        self,
        generate: Generate,
        prompt: str,
        seed: int,
        *,
        chunks: int | None,
        on_event: OnEvent | None = None,
        cancel: CancelFlag | None = None,
        prompt_rows: Tensor | None = None,
        image: Tensor | None = None,
        negative_prompt: str = "",
        decider: Decider | None = None,
    ) -> None:
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise OptionError(f"seed is {seed!r}; expected a whole number that fits 64 bits")
        self.generate, self.prompt, self.seed, self.chunks = generate, prompt, seed, chunks
        self.settings, self._runtime = generate.settings, generate.runtime
        self._image, self.negative_prompt = image, negative_prompt
        self._on_event, self._cancel = on_event, cancel
        self._started = time.perf_counter()
        self._first_frame_ms: float | None = None
        self._made = 0
        self.waiting: Chunk | None = None  # made and not handed out yet, see Generate.serve
        self._finished: deque[ChunkStats] = deque(maxlen=1000 if chunks is None else chunks)
        self._closed = False
        self._lease: weakref.finalize[..., Session] | None = None
        self._ahead: Launched | None = None
        self._stream: torch.cuda.Stream | None = None
        self._text_rows = self._encode(prompt) if prompt_rows is None else prompt_rows
        self._other_rows = self._encode_other(negative_prompt)
        self._image_rows, self._conditions = self._encode_image()
        self._rollout = self._start_rollout(decider) if self.settings.causal else None
        self.text_ms = self._elapsed_ms()
        self._decoder = self._runtime.codec.stream_decoder()
        self._recent: deque[range] = deque()
        self._emit("text")

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while self.waiting is not None or self._to_make:
                yield self.next_chunk()
        finally:
            self.close()

    def next_chunk(self) -> Chunk:
        """Denoise and decode the next chunk; raises OptionError past the end, Cancelled when cancelled."""
        self.check_open()
        if self.waiting is not None:
            chunk, self.waiting = self.waiting, None
            return chunk
        with self.whole_or_closed():
            done = None
            while done is None:
                self.check_cancelled()
                if self._rollout is None:
                    done = self._solve()
                else:
                    launched, self._ahead = self._ahead or launch([self._rollout]), None
                    (done,) = take(launched)
                    self.tell()
            return self.finish(done)

    def check_open(self) -> None:
        """:class:`OptionError` where there is no next chunk."""
        if self._closed:
            raise OptionError("this session is closed; start another one")
        if self.waiting is None and not self._to_make:
            raise OptionError(
                f"the clip has {self.chunks} chunks and all are made; ask for an endless session to go on"
            )

    def finish(self, done: DenoisedChunk) -> Chunk:
        """Decode a chunk that was denoised."""
        index = self._made
        if self._rollout is not None:
            self._remember(done.frames)
        self.check_cancelled()
        chunk = self._decode(done)
        self._finished.append(chunk.stats)
        self._made += 1
        if index == 0:
            self._first_frame_ms = self._elapsed_ms()
        self._emit("decode", index, passes=done.passes)
        self._emit("chunk", index, passes=done.passes)
        if self.chunks == self._made:
            self._give_back()
        return chunk

    def tell(self) -> None:
        """Report what the last pass did."""
        if self._rollout is not None:
            self._rollout.tell(self._on_pass, self._on_context)

    @property
    def is_open(self) -> bool:
        """Whether there is a next chunk."""
        return not self._closed and (self.waiting is not None or self._to_make)

    @property
    def _to_make(self) -> bool:
        """Whether there is a chunk that was not made yet."""
        return self.chunks is None or self._made < self.chunks

    @property
    def rollout(self) -> Rollout:
        """Of an autoregressive bundle, while the session is open."""
        if self._rollout is None:
            raise OptionError(
                "this session has no passes to share: it is over, or its bundle makes clips whole"
            )
        return self._rollout

    def _solve(self) -> DenoisedChunk:
        plan = self._token_plan
        assert plan is not None
        with self.generate.workspace() as workspace:
            with stage("text"):
                started = time.perf_counter()
                workspace.read_prompt(self._text_rows, self._other_rows, self._image_rows)
                self.text_ms += 1000 * (time.perf_counter() - started)
            done = workspace.solvers[plan].run(self.seed, self._on_pass, self.check_cancelled, self._conditions)
            return replace(done, x0=done.x0.clone())  # the next clip may begin

    @property
    def _token_plan(self) -> StepPlan | None:
        """Of this clip; None where its passes are decided by the chunk."""
        return self.settings.image_plan if self._conditions.count else self.settings.token_plan

    def set_prompt(self, prompt: str, recache: bool = False) -> None:
        """Another prompt from the next chunk on. recache: also rewrite the K/V of the frames in the window under the
        new prompt, so that the old scene pulls less; costs a context pass for each of their chunks."""
        self.check_open()
        if not self._to_make:
            raise OptionError("all chunks of the clip are made, and the last one waits to be taken; start another clip")
        if self._rollout is None:
            raise OptionError("a prompt cannot change inside a clip that is made whole; use an autoregressive bundle")
        rows = self._encode(prompt)
        rollout, engine = self._rollout, self._rollout.lane.engine
        with self.whole_or_closed(), engine.working():
            if self._ahead is not None:
                self._ahead = None
                rollout.drop()
            if not recache:
                rollout.write_context()  # under the prompt that its chunk was made with
            engine.read_prompt(rollout.lane, rows)
            self.prompt = prompt
            if recache:
                rollout.forget_context()
                if self._recent:
                    self._recache(rollout)
        self.tell()

    def _recache(self, rollout: Rollout) -> None:
        """Context passes over the frames of the window, oldest first, each seeing those before it. The window may have
        cut a chunk: what has left it stays out."""
        sink, lane, side = self.settings.sink, rollout.lane, rollout.side
        first = max(sink, self._recent[-1].stop - (self.settings.window - sink))
        parts: list[range] = []
        for frames in self._recent:
            cut = [range(frames.start, min(sink, frames.stop)), range(max(first, frames.start), frames.stop)]
            parts += [part for part in ([frames] if first == sink else cut) if part]
        clean = [lane.clean(part) for part in parts]
        lane.ring.restart(first)
        for part, rows in zip(parts, clean, strict=True):
            self.check_cancelled()
            lane.place(side, part)
            lane.rows(side).copy_(rows)
            lane.engine.run([Piece(lane, side, CONTEXT)])
            lane.remember(side)

    @contextmanager
    def whole_or_closed(self) -> Iterator[None]:
        """Closes the session on any exception: half a chunk may be in its caches, and what would follow is not the
        clip that was asked for."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the caches back. Iterating to the end does it too."""
        self._closed, self.waiting = True, None
        self._give_back()

    def _give_back(self) -> None:
        self._rollout = self._ahead = None
        self._recent.clear()
        if self._lease is not None:
            self._lease()

    def stats(self, frames: Tensor | None = None) -> Stats:
        """What has been spent so far (an endless session: in its last 1,000 chunks); with frames their SHA-256."""
        runtime, settings = self._runtime, self.settings
        return Stats(
            chunks=tuple(self._finished), prompt=self.prompt, seed=self.seed, policy=self.generate.policy.name,
            text_ms=self.text_ms, total_ms=self._elapsed_ms(), time_to_first_frame_ms=self._first_frame_ms,
            peak_memory_bytes=peak_memory(runtime.device), planned_memory_bytes=settings.plan.total,
            frames_sha256=frames_sha256(frames) if frames is not None else "", height=settings.height,
            width=settings.width, video_fps=runtime.manifest.fps, bundle=runtime.manifest.name,
            device=str(runtime.device), dtype=str(runtime.dtype).removeprefix("torch."),
            settings={"frames": settings.frames, "window": settings.window, "sink": settings.sink,
                      "sigmas": list(settings.sigmas), "guidance": settings.guidance} | self._asked(),
            backends={choice.op: choice.backend for choice in backend.describe(runtime.device.type, runtime.dtype)},
        )  # fmt: skip

    def _asked(self) -> dict[str, str | float]:
        """Settings that not every clip has, for its statistics."""
        asked: dict[str, str | float] = {}
        if self.settings.token_plan is not None:
            asked["kv_storage"] = self.settings.plan.storage
        if self.settings.guidance_2 is not None:
            asked["guidance_2"] = self.settings.guidance_2
        if self.negative_prompt:
            asked["negative_prompt"] = self.negative_prompt
        if self._image is not None:
            asked["image_sha256"] = hashlib.sha256(self._image.numpy().tobytes()).hexdigest()
        return asked

    def _encode(self, prompt: str) -> Tensor:
        with torch.no_grad(), stage("text"):
            return self._runtime.text_encoder.encode([checked_text(prompt)])

    def _encode_other(self, prompt: str) -> Tensor | None:
        """Text rows that guidance leads away from, of the empty prompt by default; None without guidance."""
        if not isinstance(prompt, str):
            raise PromptError(f"negative_prompt is {prompt!r}; expected text")
        if self.settings.guided:
            return self._runtime.text_encoder.encode([prompt])
        if prompt:
            raise OptionError(
                f"negative_prompt={prompt!r} was given, but this run has no guidance to lead away from it; leave it "
                "out, or compile a many-step bundle with a guidance_scale above 1"
            )
        return None

    def _encode_image(self) -> tuple[Tensor | None, Conditions]:
        """Rows for cross-attention, of generators that read such, and what the sampler is given."""
        runtime, settings, encoder = self._runtime, self.settings, self._runtime.image_encoder
        if self._image is None:
            return None, Conditions()
        rows = None if encoder is None else encoder.encode(self._image[None])
        kind = runtime.manifest.image_conditioning
        return rows, image_conditions(kind, runtime.codec, self._image, settings.frames, settings.grid, runtime.device)

    def _start_rollout(self, decider: Decider | None) -> Rollout:
        decider = decider or self.generate.decider(self.chunks)
        lane = self.generate.lend()
        self._lease = weakref.finalize(self, self.generate.take_back, lane)
        self._lease.atexit = False
        with lane.engine.working():
            lane.engine.read_prompt(lane, self._text_rows)
            return Rollout(lane, decider, self.seed)

    def _remember(self, frames: range) -> None:
        """Which chunks still have frames in the window, for :meth:`set_prompt`."""
        self._recent.append(frames)
        oldest = frames.stop - (self.settings.window - self.settings.sink)
        self._recent = deque(f for f in self._recent if f.stop > oldest or f.start < self.settings.sink)

    def _decode(self, done: DenoisedChunk) -> Chunk:
        """Frames of a chunk. On CUDA the next chunk's first pass is launched meanwhile, where nobody else runs in the
        engine, so that neither the host nor the device waits for the other."""
        clock = Clock(self._runtime.device)
        with stage("decode"), self._decoding():
            start = clock.mark()
            latents = self.settings.grid.unpatchify(done.x0)
            pixels = self._decoder.decode(latents)
            frames = pixels[0].float().add_(1).mul_(127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
            end = clock.mark()
        more = self.chunks is None or done.index + 1 < self.chunks
        if self._rollout is not None and more and self.generate.ahead:
            self._ahead = launch([self._rollout])
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        denoise_ms, context_ms = done.milliseconds()
        tokens, plan = done.x0.shape[1], self._token_plan
        computed = (tokens,) * done.passes if plan is None else tuple(count for count in plan.counts if count)
        stats = ChunkStats(
            index=done.index, passes=done.passes, passes_scheduled=self.settings.passes, frames=len(frames),
            confidences=done.confidences, refined=done.passes > 1, threshold=done.threshold, tokens=tokens,
            active_tokens=computed, calls_per_pass=2 if self.settings.guided else 1,
            context_passes=done.contexts, denoise_ms=denoise_ms, context_ms=context_ms,
            decode_ms=clock.between(start, end),
        )  # fmt: skip
        return Chunk(done.index, frames, latents[0], stats)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """On CUDA a stream beside that of the passes, after those that made the chunk."""
        engine = None if self._rollout is None else self._rollout.lane.engine
        if engine is None or engine.stream is None:
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(engine.device)
        self._stream.wait_stream(engine.stream)
        with torch.cuda.stream(self._stream):
            yield

    def _on_pass(self, passes: int, confidence: float | None) -> None:
        self._emit("pass", passes=passes, confidence=confidence)

    def _on_context(self, index: int) -> None:
        self._emit("context", index)

    def _emit(
        self, kind: EventKind, index: int | None = None, passes: int = 0, confidence: float | None = None
    ) -> None:
        if self._on_event is not None:
            chunk = self._made if index is None else index
            self._on_event(
                Event(kind, chunk, self.chunks, passes, confidence, self._elapsed_ms() / 1000, self.settings.passes)
            )

    def check_cancelled(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled in chunk {self._made}, before it was done")

    def _elapsed_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._started)


def checked_text(prompt: object) -> str:
    """A user's prompt; PromptError for what is no text, or empty."""
    if not isinstance(prompt, str):
        raise PromptError(f"prompt is {prompt!r}; expected text")
    if not prompt.strip():
        raise PromptError("the prompt is empty; say what the video shows, such as 'a red square bouncing'")
    return prompt
