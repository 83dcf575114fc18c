"""The compiled generate function, its streams and its sessions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event as CancelFlag
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsa_rt.cache import KVCache, TextKV
from dsa_rt.errors import Cancelled, OptionError, PromptError
from dsa_rt.media import Video
from dsa_rt.memory import MemoryPlan
from dsa_rt.ops import backend
from dsa_rt.policy import Calibration, Decider, Fixed, Policy
from dsa_rt.policy.targets import Cost
from dsa_rt.progress import Event, EventKind
from dsa_rt.sampler.ode import solve
from dsa_rt.sampler.passes import ChunkPasses
from dsa_rt.sampler.rollout import DenoisedChunk, Rollout
from dsa_rt.settings import Settings
from dsa_rt.stats import ChunkStats, Stats, frames_sha256, peak_memory

if TYPE_CHECKING:
    from dsa_rt.runtime import Runtime

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


class Generate:
    """A bundle compiled for one size, length and policy. Calls share nothing but the weights: any number of sessions
    and threads may run side by side, each with the K/V cache the plan counts once."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime, self.settings = runtime, settings
        calibration = runtime.manifest.calibration
        self._calibration = Calibration.from_dict(calibration) if calibration is not None else None
        self._cost: Cost | None = None
        if not settings.policy.needs_cost:
            self.decider(settings.chunks)  # refuses now what could only fail at the first call

    @property
    def policy(self) -> Policy:
        return self.settings.policy

    @property
    def plan(self) -> MemoryPlan:
        return self.settings.plan

    def decider(self, chunks: int | None) -> Decider:
        """A fresh decider of the policy for one clip; None: without end."""
        return self.policy.begin(
            self.settings.passes, chunks, self._calibration, has_head=self.runtime.head is not None, cost=self._cost
        )

    def warm_up(self, on_event: OnEvent | None, started: float) -> None:
        """Run every kind of pass once, and time them where the policy's target is a speed."""
        settings = self.settings
        rounds = 3 if settings.policy.needs_cost else 1
        sigmas = settings.sigmas if settings.causal else (1.0, 0.0)
        probe = Generate(self.runtime, replace(settings, policy=Fixed(), sigmas=sigmas))
        chunks: list[ChunkStats] = []
        text_seconds = 0.0
        for number in range(rounds):
            session = Session(probe, "", 0, chunks=None if settings.causal else 1, prompt_rows=_silence(self.runtime))
            for _ in range(1 if rounds == 1 else min(settings.chunks, 8)):
                chunks.append(session.next_chunk().stats)
            text_seconds = session.text_ms / 1000
            if on_event is not None:
                on_event(Event("warmup", chunk=number, chunks=rounds, seconds=time.perf_counter() - started))
        if settings.policy.needs_cost:
            timed = chunks[len(chunks) // rounds :]
            mean = 1000.0 * len(timed)
            self._cost = Cost(
                sum(c.denoise_ms / c.passes for c in timed) / mean, sum(c.context_ms for c in timed) / mean,
                sum(c.decode_ms for c in timed) / mean, settings.frames / settings.chunks, text_seconds,
            )  # fmt: skip
            self.decider(settings.chunks)

    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        on_event: OnEvent | None = None,
        cancel: CancelFlag | None = None,
    ) -> Video | list[Video]:
        """One clip, or one for each prompt of a list (seeds seed, seed + 1, … unless a list is given).

        Clips of a list are made one after the other, each exactly as if it had been asked for alone. Setting the
        ``threading.Event`` ``cancel`` ends the call within one pass with :class:`~dsa_rt.errors.Cancelled`.
        """
        if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
            if not isinstance(seed, int):
                raise OptionError(f"seed is {seed!r}; one prompt takes one whole number")
            return self._clip(prompt, seed, on_event, cancel)
        if not isinstance(seed, int | list | tuple | range):
            raise OptionError(f"seed is {seed!r}; expected a whole number, or a list with one for each prompt")
        seeds = [seed + i for i in range(len(prompt))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompt):
            raise OptionError(f"{len(prompt)} prompts came with {len(seeds)} seeds; give one seed, or one for each")
        for text in prompt:  # one that is refused is refused before the first clip
            self.runtime.text_encoder.encode([_text(text)])
        return [self._clip(p, s, on_event, cancel) for p, s in zip(prompt, seeds, strict=True)]

    def stream(
        self, prompt: str, seed: int = 0, on_event: OnEvent | None = None, cancel: CancelFlag | None = None
    ) -> Iterator[Chunk]:
        """The clip chunk by chunk, each as soon as it is decoded; bit for bit the frames of a call."""
        session = Session(self, prompt, seed, chunks=self.settings.chunks, on_event=on_event, cancel=cancel)
        return iter(session)

    def session(
        self,
        prompt: str,
        seed: int = 0,
        on_event: OnEvent | None = None,
        cancel: CancelFlag | None = None,
        *,
        endless: bool = False,
    ) -> Session:
        """A clip in the caller's hands: chunks on demand, prompt changes between them; ``endless``: beyond the compiled
        length, in the memory of the compiled window."""
        if endless and not self.settings.causal:
            raise OptionError(
                "endless=True needs an autoregressive bundle; this generator makes the whole clip at once"
            )
        chunks = None if endless else self.settings.chunks
        return Session(self, prompt, seed, chunks=chunks, on_event=on_event, cancel=cancel)

    def _clip(self, prompt: str, seed: int, on_event: OnEvent | None, cancel: CancelFlag | None) -> Video:
        session = Session(self, prompt, seed, chunks=self.settings.chunks, on_event=on_event, cancel=cancel)
        chunks = list(session)
        frames = torch.cat([c.frames for c in chunks])
        latents = torch.cat([c.latents for c in chunks], 1)
        return Video(frames, latents, self.runtime.manifest.fps, session.stats(frames))


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
    ) -> None:
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise OptionError(f"seed is {seed!r}; expected a whole number that fits 64 bits")
        self.generate, self.prompt, self.seed, self.chunks = generate, prompt, seed, chunks
        self.settings, self._runtime = generate.settings, generate.runtime
        self._on_event, self._cancel = on_event, cancel
        self._started = time.perf_counter()
        self._first_frame_ms: float | None = None
        self._made = 0
        self._finished: deque[ChunkStats] = deque(maxlen=1000 if chunks is None else chunks)
        self._closed = False
        text = self._read(prompt, prompt_rows)
        self.text_ms = self._elapsed_ms()
        self._decoder = self._runtime.codec.stream_decoder()
        self._recent: deque[tuple[range, Tensor]] = deque()
        self._text = text
        self._rollout = self._start_rollout(text) if self.settings.causal else None
        self._emit("text")

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while self.chunks is None or self._made < self.chunks:
                yield self.next_chunk()
        finally:
            self.close()

    def next_chunk(self) -> Chunk:
        """Denoise and decode the next chunk; raises OptionError past the end, Cancelled when cancelled."""
        if self._closed:
            raise OptionError("this session is closed; start another one")
        if self.chunks is not None and self._made >= self.chunks:
            raise OptionError(
                f"the clip has {self.chunks} chunks and all are made; ask for an endless session to go on"
            )
        with self._whole_or_closed():
            return self._make_chunk(self._made)

    def _make_chunk(self, index: int) -> Chunk:
        self._check()
        if self._rollout is not None:
            done = self._rollout.next_chunk(self._on_pass, self._check)
            self._remember(done)
            self._emit("context", passes=done.passes)
        else:
            empty = None if self.settings.guidance == 1 else self._read("", _silence(self._runtime))
            done = solve(
                self._runtime.model, self.settings.grid, range(self.settings.latent_frames), self._text, empty,
                self.settings.sigmas, self.settings.guidance, self.seed, self._on_pass, self._check,
            )  # fmt: skip
        self._check()
        chunk = self._decode(done)
        self._finished.append(chunk.stats)
        self._made += 1
        if index == 0:
            self._first_frame_ms = self._elapsed_ms()
        self._emit("decode", index, passes=done.passes)
        self._emit("chunk", index, passes=done.passes)
        return chunk

    def set_prompt(self, prompt: str, recache: bool = False) -> None:
        """Another prompt from the next chunk on. recache: also rewrite the K/V of the frames in the window under the
        new prompt, so that the old scene pulls less; costs a context pass for each of their chunks."""
        if self._closed:
            raise OptionError("this session is closed; start another one")
        if self._rollout is None:
            raise OptionError("a prompt cannot change inside a clip that is made whole; use an autoregressive bundle")
        self._rollout.passes.text = self._read(prompt)
        self.prompt = prompt
        if recache and self._recent:
            with self._whole_or_closed():
                self._recache(self._rollout.passes)

    def _recache(self, passes: ChunkPasses) -> None:
        """Context passes over the frames of the window, oldest first, each seeing those before it. The window may have
        cut a chunk: what has left it stays out."""
        sink = self.settings.sink
        first = max(sink, self._recent[-1][0].stop - (self.settings.window - sink))
        passes.cache.restart(first)
        for frames, x0 in self._recent:
            cut = [range(frames.start, min(sink, frames.stop)), range(max(first, frames.start), frames.stop)]
            for part in [frames] if first == sink else cut:
                if part:
                    self._check()
                    rows = slice((part.start - frames.start) * self.settings.grid.tokens,
                                 (part.stop - frames.start) * self.settings.grid.tokens)  # fmt: skip
                    passes.write_context(x0[:, rows], passes.active(part))

    @contextmanager
    def _whole_or_closed(self) -> Iterator[None]:
        """Closes the session on any exception: half a chunk may be in its caches, and what would follow is not the
        clip that was asked for."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the caches back. Iterating to the end does it too."""
        self._closed = True
        self._rollout = None
        self._recent.clear()

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
                      "sigmas": list(settings.sigmas), "guidance": settings.guidance},
            backends={choice.op: choice.backend for choice in backend.describe(runtime.device.type, runtime.dtype)},
        )  # fmt: skip

    def _read(self, prompt: str, rows: Tensor | None = None) -> TextKV:
        with torch.no_grad():
            rows = self._runtime.text_encoder.encode([_text(prompt)]) if rows is None else rows
            return self._runtime.model.embed_text(rows)

    def _start_rollout(self, text: TextKV) -> Rollout:
        model, settings = self._runtime.model, self.settings
        cache = KVCache(
            layers=model.config.layers, batch=1, window=settings.window, sink=settings.sink,
            tokens_per_frame=settings.grid.tokens, heads=model.config.heads, head_dim=model.config.head_dim,
            dtype=self._runtime.dtype, device=self._runtime.device,
        )  # fmt: skip
        passes = ChunkPasses(model, settings.grid, text, cache)
        decider = self.generate.decider(self.chunks)
        return Rollout(passes, self._runtime.head, settings.sigmas, decider, self.seed, settings.chunk_frames)

    def _remember(self, done: DenoisedChunk) -> None:
        """Keep the clean rows of chunks that still have frames in the window, for :meth:`set_prompt`."""
        self._recent.append((done.frames, done.x0))
        oldest = done.frames.stop - (self.settings.window - self.settings.sink)
        kept = [item for item in self._recent if item[0].stop > oldest or item[0].start < self.settings.sink]
        self._recent = deque(kept)

    def _decode(self, done: DenoisedChunk) -> Chunk:
        start = time.perf_counter()
        latents = self.settings.grid.unpatchify(done.x0)
        pixels = self._decoder.decode(latents)
        frames = pixels[0].float().add_(1).mul_(127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
        tokens = done.x0.shape[1]
        stats = ChunkStats(
            index=done.index, passes=done.passes, passes_scheduled=self.settings.passes, frames=len(frames),
            confidences=done.confidences, refined=done.passes > 1, threshold=done.threshold, tokens=tokens,
            active_tokens=(tokens,) * done.passes, calls_per_pass=1 if self.settings.guidance == 1 else 2,
            context_passes=1 if self.settings.causal else 0, denoise_ms=done.denoise_ms, context_ms=done.context_ms,
            decode_ms=1000 * (time.perf_counter() - start),
        )  # fmt: skip
        return Chunk(done.index, frames, latents[0], stats)

    def _on_pass(self, passes: int, confidence: float | None) -> None:
        self._emit("pass", passes=passes, confidence=confidence)

    def _emit(
        self, kind: EventKind, index: int | None = None, passes: int = 0, confidence: float | None = None
    ) -> None:
        if self._on_event is not None:
            chunk = self._made if index is None else index
            self._on_event(
                Event(kind, chunk, self.chunks, passes, confidence, self._elapsed_ms() / 1000, self.settings.passes)
            )

    def _check(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled in chunk {self._made}, before it was done")

    def _elapsed_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._started)


def _text(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise PromptError(f"prompt is {prompt!r}; expected text")
    return prompt


def _silence(runtime: Runtime) -> Tensor:
    """Text rows of the empty prompt, the unconditional one."""
    return runtime.text_encoder.encode([""])
