"""Progress: the events a compile or a generation reports, and the bar that shows them on a terminal.

Events go to any callable (`on_event`); :class:`ProgressBar` is one. No torch here, so that the command line
can import it before anything heavy.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Literal, TextIO

EventKind = Literal["warmup", "text", "pass", "context", "decode", "chunk"]


@dataclass(frozen=True)
class Event:
    """One thing that just finished.

    kind: "warmup" (one shape warmed up in compile), "text" (prompt encoded), "pass" (one denoise pass of a
        chunk), "context" (the chunk's context pass, which runs with the first pass of the next one), "decode"
        (its frames are pixels), "chunk" (all of it is done).
    chunk: index of the chunk (or warm-up), from 0.  chunks: how many there will be, None when that is open.
    passes: denoise passes the chunk has had so far.  passes_scheduled: the most it can have (0 = not said).
    confidence: the head's confidence after this pass in [0, 1], None where the head was not asked.
    seconds: since the call started.
    """

    kind: EventKind
    chunk: int = 0
    chunks: int | None = None
    passes: int = 0
    confidence: float | None = None
    seconds: float = 0.0
    passes_scheduled: int = 0


class ProgressBar:
    """A bar on stderr that follows events; silent when disabled or when the stream is not a terminal.

    Its unit is a scheduled pass, so that it moves for one chunk of fifty steps as for fifty chunks of one;
    passes that a policy saves are jumped over when their chunk is done. Usable as a context manager and as
    `on_event`.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled and self._stream.isatty()
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stage(self, text: str) -> None:
        """Starts a new bar that says what is being done now ("loading demo")."""
        self.close()
        self._stage = text
        if self._enabled:
            from tqdm import tqdm

            self._bar = tqdm(
                total=1,
                desc=text,
                file=self._stream,
                leave=False,
                ncols=min(_columns(self._stream), 100),
                nrows=20,  # there is one bar; a terminal of unknown size would hide it
                bar_format="{desc:<34} |{bar}| {percentage:3.0f}% [{elapsed}]",
                mininterval=0.05,
            )

    def __call__(self, event: Event) -> None:
        if not self._enabled:
            return
        if self._bar is None:
            self.stage("generating")
        done, total = progress(event)
        bar = self._bar
        if total is not None:
            bar.total = total
        bar.n = max(bar.n, done)
        bar.set_description_str(caption(event, self._stage), refresh=False)
        bar.update(0)
        if event.kind != "pass":
            bar.refresh()

    def close(self) -> None:
        """Removes the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _columns(stream: TextIO) -> int:
    """Width of the terminal behind a stream; 80 where it does not say (some report 0)."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def progress(event: Event) -> tuple[int, int | None]:
    """(work done, work in all or None when the number of chunks is open), in scheduled passes."""
    per_chunk = max(event.passes_scheduled, 1)
    if event.kind == "text":
        done = 0
    elif event.kind == "pass" and event.passes_scheduled:
        done = event.chunk * per_chunk + min(event.passes, per_chunk)
    elif event.kind == "pass":  # passes without a schedule say nothing about how far the chunk is
        done = event.chunk
    else:
        done = (event.chunk + 1) * per_chunk
    return done, None if event.chunks is None else event.chunks * per_chunk


def caption(event: Event, stage: str = "") -> str:
    """What the bar says beside itself, for example "chunk 3/7, pass 2, confidence 0.54"."""
    if event.kind == "text":
        return stage or "reading the prompt"
    number = f"{event.chunk + 1}" if event.chunks is None else f"{event.chunk + 1}/{event.chunks}"
    if event.kind == "warmup":
        return f"{stage or 'compiling'} {number}"
    words = [f"chunk {number}", {"pass": f"pass {event.passes}", "chunk": "done"}.get(event.kind, event.kind)]
    if event.confidence is not None:
        words.append(f"confidence {event.confidence:.2f}")
    return ", ".join(words)
