"""The compiled generate function."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from threading import Event as CancelFlag
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dsa_rt.engine import Engine, Lane, Sizes
from dsa_rt.errors import MemoryLimitError, OptionError
from dsa_rt.images import read_image
from dsa_rt.media import Video
from dsa_rt.memory import MemoryPlan
from dsa_rt.policy import Calibration, Decider, Fixed, Policy
from dsa_rt.policy.targets import Cost
from dsa_rt.progress import Event
from dsa_rt.recording import record
from dsa_rt.sampler.rollout import DenoisedChunk, advance
from dsa_rt.session import Chunk, OnEvent, Session, checked_text
from dsa_rt.settings import Settings
from dsa_rt.stats import ChunkStats
from dsa_rt.workspace import Workspace

if TYPE_CHECKING:
    from dsa_rt.images import ImageLike
    from dsa_rt.runtime import Runtime


class Generate:
    """A bundle compiled for one size, length and policy.

    Any number of sessions and threads may run side by side. What ``sessions`` of them run on is there once compile is
    done, and is what the plan counts; one more takes as much again for itself while it is open.
    """

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime, self.settings = runtime, settings
        calibration = runtime.manifest.calibration
        self._calibration = Calibration.from_dict(calibration) if calibration is not None else None
        self._cost: Cost | None = None
        self._free: list[Lane] = []
        self._engine: Engine | None = None
        self._idle: Workspace | None = None
        self._lock = threading.Lock()
        # Whether a chunk's first pass starts before the one before it is handed out. A CPU would only be late then.
        self.ahead = runtime.device.type == "cuda" and settings.sessions == 1
        if settings.causal and not settings.policy.needs_cost:
            self.decider(settings.chunks)  # refuses now what could only fail at the first call

    @property
    def policy(self) -> Policy:
        return self.settings.policy

    @property
    def plan(self) -> MemoryPlan:
        return self.settings.plan

    def decider(self, chunks: int | None) -> Decider:
        """A fresh decider of the policy for one clip of an autoregressive bundle; None: without end."""
        return self.policy.begin(
            self.settings.passes, chunks, self._calibration, has_head=self.runtime.head is not None, cost=self._cost
        )

    def warm_up(self, on_event: OnEvent | None, started: float) -> None:
        """Make all buffers, run every kind of pass once, and time them where the policy's target is a speed."""
        settings = self.settings
        if not settings.causal:
            self._warm_up_whole()
            if on_event is not None:
                on_event(Event("warmup", chunk=0, chunks=1, seconds=time.perf_counter() - started))
            return
        self._free = self._lanes(settings.sessions)
        self._engine = self._free[0].engine
        chunks, text_seconds = list[ChunkStats](), 0.0
        rounds = 3 if settings.policy.needs_cost else 1
        for number in range(rounds):
            with closing(self._probe(None, Fixed().begin(settings.passes, None))) as session:
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

    def _warm_up_whole(self) -> None:
        """Of a many-step bundle: every kind of pass, then the decoder."""
        settings = self.settings
        with self._within_plan():
            workspace = Workspace(self.runtime, settings, record if settings.plan.held else None)
            workspace.warm_up()
            if settings.plan.held:
                self._idle = workspace
            del workspace
            frames = range(settings.latent_frames)
            rows = torch.zeros(1, len(frames) * settings.grid.tokens, self.runtime.model.config.velocity_dim)
            done = DenoisedChunk(0, frames, rows.to(self.runtime.device), 0, (), None, lambda: (0.0, 0.0))
            with closing(self._probe(1, None)) as session:
                session.finish(done)

    def _probe(self, chunks: int | None, decider: Decider | None) -> Session:
        """A clip of no particular prompt."""
        grey = self.runtime.manifest.image_conditioning == "concat"
        return Session(
            self, "", 0, chunks=chunks, prompt_rows=self.runtime.text_encoder.encode([""]),
            image=_grey(self.settings) if grey else None, decider=decider,
        )  # fmt: skip

    def _lanes(self, count: int) -> list[Lane]:
        """Of a new engine: everything that ``count`` clips side by side run on, each kind of pass recorded."""
        runtime, s = self.runtime, self.settings
        sizes = Sizes(s.grid, s.chunk_frames, s.window, s.sink, s.places, s.sigmas, count)
        with self._within_plan():
            engine = Engine(runtime.model, runtime.head, sizes, runtime.device)
            lanes = engine.lanes()
            with engine.working():
                engine.warm_up(lanes, s.chunks, judged=not isinstance(s.policy, Fixed))
        return lanes

    @contextmanager
    def _within_plan(self) -> Iterator[None]:
        """:class:`MemoryLimitError` with the plan where memory runs out all the same."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:  # torch has a RuntimeError for either kind of memory
            if isinstance(error, MemoryLimitError) or (isinstance(error, RuntimeError) and "memory" not in str(error)):
                raise
            raise MemoryLimitError(
                f"memory ran out in compile, though the plan fits what was free:\n{self.plan.table()}\n{error}"
            ) from error

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """What one clip of a many-step bundle runs on: that which compile made, if it did and nobody is using it, or
        another one that goes with the clip."""
        with self._lock:
            mine, self._idle = self._idle, None
        try:
            yield mine or Workspace(self.runtime, self.settings)
        finally:
            if mine is not None:
                self._idle = mine

    def lend(self) -> Lane:
        """A lane for one clip; give it back with :meth:`take_back`."""
        with self._lock:
            if self._free:
                return self._free.pop(0)
        return self._lanes(1)[0]

    def take_back(self, lane: Lane) -> None:
        """The clip is over. What was made for more clips than compile was told of is let go."""
        if lane.engine is self._engine:
            with self._lock:
                self._free.append(lane)

    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        on_event: OnEvent | None = None,
        cancel: CancelFlag | None = None,
        *,
        image: ImageLike | Sequence[ImageLike] | None = None,
        negative_prompt: str = "",
    ) -> Video | list[Video]:
        """One clip, or one for each prompt of a list (seeds seed, seed + 1, … unless a list is given).

        Clips of a list are made one after the other, or as many at a time as ``sessions`` was compiled for; each is
        what it would be alone (on CUDA within the rounding of matmuls over more rows). Setting the ``threading.Event``
        ``cancel`` ends the call within one pass with :class:`~dsa_rt.errors.Cancelled`.

        image: the first frame, for image-to-video bundles, see :func:`dsa_rt.images.read_image`; of a list of prompts
        one for all or a list with one for each. negative_prompt: what guidance leads away from.
        """
        if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
            if not isinstance(seed, int):
                raise OptionError(f"seed is {seed!r}; one prompt takes one whole number")
            if isinstance(image, list | tuple):
                raise OptionError(f"{len(image)} images came with one prompt; give one image")
            one = cast("ImageLike | None", image)
            return self._clip(self.session(prompt, seed, on_event, cancel, image=one, negative_prompt=negative_prompt))
        if not isinstance(seed, int | list | tuple | range):
            raise OptionError(f"seed is {seed!r}; expected a whole number, or a list with one for each prompt")
        seeds = [seed + i for i in range(len(prompt))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompt):
            raise OptionError(f"{len(prompt)} prompts came with {len(seeds)} seeds; give one seed, or one for each")
        images = list(image) if isinstance(image, list | tuple) else [cast("ImageLike | None", image)] * len(prompt)
        if len(images) != len(prompt):
            raise OptionError(f"{len(prompt)} prompts came with {len(images)} images; give one image, or one for each")
        for text in prompt:  # one that is refused is refused before the first clip
            self.runtime.text_encoder.encode([checked_text(text)])
        pictures = [self._picture(picture) for picture in images]
        clips = iter(
            Session(self, text, number, chunks=self.settings.chunks, on_event=on_event, cancel=cancel, image=picture,
                    negative_prompt=negative_prompt)
            for text, number, picture in zip(prompt, seeds, pictures, strict=True)
        )  # fmt: skip
        if self.settings.sessions == 1:
            return [self._clip(session) for session in clips]
        return self._clips(clips)

    def _clips(self, waiting: Iterator[Session]) -> list[Video]:
        """All of them in order, as many at a time as there are lanes."""
        running = list(itertools.islice(waiting, self.settings.sessions))
        made: dict[Session, list[Chunk]] = {session: [] for session in running}
        try:
            while running:
                chunks, error = self._advance(running)
                if error is not None:
                    raise error
                for session, chunk in chunks:
                    made[session].append(chunk)
                    if len(made[session]) == session.chunks:
                        running.remove(session)
                        for following in itertools.islice(waiting, 1):
                            running.append(following)
                            made[following] = []
        finally:
            for session in running:
                session.close()
        return [self._video(session, chunks) for session, chunks in made.items()]

    def serve(self, sessions: Sequence[Session]) -> Iterator[tuple[Session, Chunk]]:
        """Chunks of several clips as they get done, all running in the same passes.

        sessions: of this function, at any chunk, no more than it was compiled for (``sessions``). Ends with the last
        clip; a session that is closed on the way, or whose own error comes out here, is left out when this is called
        again with the others. Each clip is what it would be alone, see :meth:`__call__`. Several chunks may come of one
        pass: where a loop is left between two of them, the second waits in its session, which hands it out next.
        """
        running = list(sessions)
        for session in running:
            here = session.waiting is not None or session.rollout.lane.engine is self._engine
            if session.generate is not self or not here:
                raise OptionError(
                    f"serve runs up to {self.settings.sessions} sessions of the function that it is called on; compile "
                    f"with sessions={len(running)} and start them all from that"
                )
            session.check_open()
        while running := [s for s in running if s.is_open]:
            error = None
            if all(session.waiting is None for session in running):
                chunks, error = self._advance(running)
                for session, chunk in chunks:
                    session.waiting = chunk
            for session in running:
                if session.waiting is not None:
                    yield session, session.next_chunk()
            if error is not None:
                raise error

    def _advance(self, sessions: Sequence[Session]) -> tuple[list[tuple[Session, Chunk]], BaseException | None]:
        """One pass for all; the chunks that it finished, and what one of them raised after it: the pass has moved the
        others on too, so that their chunks are made whatever happens to that one."""
        for session in sessions:
            with session.whole_or_closed():
                session.check_cancelled()
        finished = advance([session.rollout for session in sessions])
        chunks: list[tuple[Session, Chunk]] = []
        error: BaseException | None = None
        for session, done in zip(sessions, finished, strict=True):
            try:
                with session.whole_or_closed():
                    session.tell()
                    if done is not None:
                        chunks.append((session, session.finish(done)))
            except BaseException as raised:
                if error is None:
                    error = raised
                else:
                    error.add_note(f"another session ended too, with {raised!r}")
        return chunks, error

    def stream(
        self,
        prompt: str,
        seed: int = 0,
        on_event: OnEvent | None = None,
        cancel: CancelFlag | None = None,
        *,
        image: ImageLike | None = None,
        negative_prompt: str = "",
    ) -> Iterator[Chunk]:
        """The clip chunk by chunk, each as soon as it is decoded; bit for bit the frames of a call."""
        return iter(self.session(prompt, seed, on_event, cancel, image=image, negative_prompt=negative_prompt))

    def session(
        self,
        prompt: str,
        seed: int = 0,
        on_event: OnEvent | None = None,
        cancel: CancelFlag | None = None,
        *,
        endless: bool = False,
        image: ImageLike | None = None,
        negative_prompt: str = "",
    ) -> Session:
        """A clip in the caller's hands: chunks on demand, prompt changes between them; ``endless``: beyond the compiled
        length, in the memory of the compiled window."""
        if endless and not self.settings.causal:
            raise OptionError(
                "endless=True needs an autoregressive bundle; this generator makes the whole clip at once"
            )
        return Session(
            self, prompt, seed, chunks=None if endless else self.settings.chunks, on_event=on_event, cancel=cancel,
            image=self._picture(image), negative_prompt=negative_prompt,
        )  # fmt: skip

    def _clip(self, session: Session) -> Video:
        return self._video(session, list(session))

    def _video(self, session: Session, chunks: Sequence[Chunk]) -> Video:
        frames = torch.cat([c.frames for c in chunks])
        latents = torch.cat([c.latents for c in chunks], 1)
        return Video(frames, latents, self.runtime.manifest.fps, session.stats(frames))

    def _picture(self, image: ImageLike | None) -> Tensor | None:
        """Pixels of the first frame [H, W, 3] uint8; refused where the bundle takes none, or lacks one."""
        manifest, settings = self.runtime.manifest, self.settings
        if image is None:
            if manifest.image_conditioning == "concat":
                raise OptionError(
                    f"bundle {manifest.name!r} makes video from an image and a prompt: give the first frame, image=… "
                    f"(--image), of {settings.width}x{settings.height} pixels"
                )
            return None
        if manifest.image_conditioning == "none":
            raise OptionError(
                f"image was given, but bundle {manifest.name!r} makes video from a prompt alone; leave it out, or use "
                "an image-to-video bundle"
            )
        if manifest.image_conditioning == "first-frame" and settings.image_plan is None:
            raise OptionError("image was given, but one frame was asked for, which it would be; ask for more frames")
        return read_image(image, settings.height, settings.width)


def _grey(settings: Settings) -> Tensor:
    return torch.full((settings.height, settings.width, 3), 128, dtype=torch.uint8)
