"""What one generation spent: passes, confidences, milliseconds, frames per second, memory, and where it ran.

Times are wall clock. What they include is fixed here, in the docstrings of the three frames-per-second
figures, and repeated in every record (`Stats.notes`), because a figure that does not say what it contains
cannot be compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from dsa_rt.errors import OptionError
from dsa_rt.machine import machine, peak_memory, versions

if TYPE_CHECKING:
    import torch

__all__ = ["INCLUDED", "ChunkStats", "Stats", "frames_sha256", "machine", "peak_memory", "versions"]

INCLUDED = (
    "fps_denoise: frames / (denoise passes + context passes); text, decode and everything else excluded",
    "fps_with_decode: as fps_denoise, plus decoding latents to pixels",
    "fps_end_to_end: frames / wall clock of the call, prompt to last decoded frame, text encoder included",
    "excluded everywhere: loading, compiling, warm-up, writing files",
)


@dataclass(frozen=True, kw_only=True)
class ChunkStats:
    """One chunk.

    index: from 0.  frames: pixel frames it decoded to.
    passes: denoise passes that ran, of passes_scheduled.  context_passes: those of the chunk before, which run with
        this chunk's first pass; nothing follows the clip's last chunk, so that it has none.
    confidences: one per pass that ran, in [0, 1]; None where the head was not asked.
    refined: whether the policy asked for more than the first pass.
    threshold: what the first confidence was compared with, None if the policy has no threshold.
    tokens: tokens of the chunk; active_tokens: how many of them each pass computed.
    calls_per_pass: model evaluations a pass takes (2 with classifier-free guidance).
    denoise_ms, context_ms, decode_ms: wall clock of each stage; a pass that is denoise and context pass in one is
        shared out by rows.
    """

    index: int
    passes: int
    passes_scheduled: int
    frames: int
    confidences: tuple[float | None, ...] = ()
    refined: bool = False
    threshold: float | None = None
    tokens: int = 0
    active_tokens: tuple[int, ...] = ()
    calls_per_pass: int = 1
    context_passes: int = 1
    denoise_ms: float = 0.0
    context_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def first_confidence(self) -> float | None:
        """Confidence after the first pass, the one a policy decides by."""
        return self.confidences[0] if self.confidences else None

    @property
    def last_confidence(self) -> float | None:
        """The last confidence the head gave for this chunk, None if it was not asked."""
        return next((value for value in reversed(self.confidences) if value is not None), None)

    @property
    def model_calls(self) -> int:
        """Model evaluations: passes (times two under guidance) and context passes."""
        return self.passes * self.calls_per_pass + self.context_passes

    @property
    def model_calls_scheduled(self) -> int:
        """Model evaluations had every scheduled pass run."""
        return self.passes_scheduled * self.calls_per_pass + self.context_passes


@dataclass(frozen=True, kw_only=True)
class Stats:
    """One generation. `to_dict` is JSON-ready and `from_dict` takes it back.

    seed, prompt, policy, bundle, device, dtype, height, width [pixels], video_fps [frames/s of playback],
        settings: asked.
    text_ms, total_ms, time_to_first_frame_ms: wall clock from the start of the call (text: its own duration).
    peak_memory_bytes: measured, see :func:`peak_memory`.  planned_memory_bytes: what the plan promised.
    frames_sha256: SHA-256 over the raw uint8 [T, H, W, 3] bytes.
    backends: op → what served it, "native or cudnn" where that goes by shape.
    versions, machine: where it ran.  notes: what is included and what is not.
    """

    chunks: tuple[ChunkStats, ...]
    prompt: str
    seed: int
    policy: str
    text_ms: float = 0.0
    total_ms: float = 0.0
    time_to_first_frame_ms: float | None = None
    peak_memory_bytes: int | None = None
    planned_memory_bytes: int | None = None
    frames_sha256: str = ""
    height: int = 0
    width: int = 0
    video_fps: float = 16.0
    bundle: str = ""
    device: str = "cpu"
    dtype: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    machine: Mapping[str, Any] = field(default_factory=machine)
    notes: tuple[str, ...] = INCLUDED

    @property
    def frames(self) -> int:
        """Pixel frames made."""
        return sum(chunk.frames for chunk in self.chunks)

    @property
    def passes(self) -> int:
        """Denoise passes that ran."""
        return sum(chunk.passes for chunk in self.chunks)

    @property
    def passes_scheduled(self) -> int:
        """Denoise passes the full schedule has."""
        return sum(chunk.passes_scheduled for chunk in self.chunks)

    @property
    def model_calls(self) -> int:
        """NFE: evaluations of the generator, denoise and context passes (28 + 7 = 35 in the paper)."""
        return sum(chunk.model_calls for chunk in self.chunks)

    @property
    def model_calls_scheduled(self) -> int:
        """NFE of the full schedule."""
        return sum(chunk.model_calls_scheduled for chunk in self.chunks)

    @property
    def denoise_ms(self) -> float:
        """Time in denoise passes, head and re-noising included."""
        return sum(chunk.denoise_ms for chunk in self.chunks)

    @property
    def context_ms(self) -> float:
        """Time in context passes."""
        return sum(chunk.context_ms for chunk in self.chunks)

    @property
    def decode_ms(self) -> float:
        """Time in the video decoder, up to uint8 frames."""
        return sum(chunk.decode_ms for chunk in self.chunks)

    @property
    def fps_denoise(self) -> float | None:
        """Frames per second of the generator alone: frames / (denoise_ms + context_ms)."""
        return self._rate(self.denoise_ms + self.context_ms)

    @property
    def fps_with_decode(self) -> float | None:
        """Frames per second with the video decoder: frames / (denoise_ms + context_ms + decode_ms)."""
        return self._rate(self.denoise_ms + self.context_ms + self.decode_ms)

    @property
    def fps_end_to_end(self) -> float | None:
        """Frames per second of the whole call: frames / total_ms, text encoder and all host work included."""
        return self._rate(self.total_ms)

    @property
    def active_tokens(self) -> tuple[int, ...]:
        """Tokens computed in each denoise pass, in the order the passes ran."""
        return tuple(count for chunk in self.chunks for count in chunk.active_tokens)

    @property
    def active_token_share(self) -> float | None:
        """Tokens computed in denoise passes, as a share of the full schedule's (1.0 = dense)."""
        scheduled = sum(chunk.tokens * chunk.passes_scheduled for chunk in self.chunks)
        return sum(self.active_tokens) / scheduled if scheduled else None

    def frame_spans(self) -> list[range]:
        """For each chunk the indices of its frames in the video."""
        spans, start = [], 0
        for chunk in self.chunks:
            spans.append(range(start, start + chunk.frames))
            start += chunk.frames
        return spans

    def _rate(self, milliseconds: float) -> float | None:
        return 1000.0 * self.frames / milliseconds if milliseconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings: every field, and the derived figures beside them."""
        record: dict[str, Any] = {name: getattr(self, name) for name in _DERIVED}
        for item in dataclasses.fields(self):
            record[item.name] = _plain(getattr(self, item.name))
        record["active_tokens"] = list(self.active_tokens)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Stats:
        """The inverse of :meth:`to_dict`. OptionError names a field that is missing or not known."""
        values = {key: value for key, value in record.items() if key not in _DERIVED}
        values["chunks"] = tuple(_build(ChunkStats, chunk) for chunk in values.get("chunks", ()))
        stats: Stats = _build(cls, values)
        return stats

    def table(self) -> str:
        """A short table for people: a row per chunk, then the totals."""
        rows = [("chunk", "frames", "passes", "confidence", "denoise", "context", "decode")]
        for chunk in self.chunks:
            rows.append(
                (
                    str(chunk.index),
                    str(chunk.frames),
                    f"{chunk.passes}/{chunk.passes_scheduled}",
                    _confidence(chunk),
                    _ms(chunk.denoise_ms),
                    _ms(chunk.context_ms),
                    _ms(chunk.decode_ms),
                )
            )
        total = (
            "all",
            str(self.frames),
            f"{self.passes}/{self.passes_scheduled}",
            "",
            _ms(self.denoise_ms),
            _ms(self.context_ms),
            _ms(self.decode_ms),
        )
        rows.append(total)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        if len(self.chunks) > 24:  # the ends of a long video tell enough
            lines = [*lines[:11], "…".rjust(widths[0]), *lines[-9:]]
        share = self.active_token_share
        lines += [
            "",
            f"model calls        {self.model_calls} of {self.model_calls_scheduled}"
            + ("" if share is None else f" ({share:.0%} of the denoise tokens)"),
            f"frames per second  {_figure(self.fps_denoise)} denoise, "
            f"{_figure(self.fps_with_decode)} with decode, {_figure(self.fps_end_to_end)} end to end",
            f"time               {_ms(self.total_ms)} in all, {_ms(self.text_ms)} text, "
            f"first frame after {_ms(self.time_to_first_frame_ms)}",
            f"memory             {_megabytes(self.planned_memory_bytes)} planned; peak "
            + (f"{_megabytes(self.peak_memory_bytes)} on the device" if self.device.startswith("cuda") else
               f"{_megabytes(self.peak_memory_bytes)} of the whole process, interpreter and torch included"),
        ]
        return "\n".join(lines)


_DERIVED = (
    "frames",
    "passes",
    "passes_scheduled",
    "model_calls",
    "model_calls_scheduled",
    "denoise_ms",
    "context_ms",
    "decode_ms",
    "fps_denoise",
    "fps_with_decode",
    "fps_end_to_end",
    "active_tokens",
    "active_token_share",
)


def frames_sha256(frames: torch.Tensor | Iterable[torch.Tensor]) -> str:
    """SHA-256 in hex over the bytes of uint8 frames [T, H, W, 3], given whole or as consecutive pieces."""
    digest = hashlib.sha256()
    pieces = cast("Iterable[torch.Tensor]", [frames] if hasattr(frames, "numpy") else frames)
    for piece in pieces:
        digest.update(piece.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    return value


def _build(kind: Any, record: Mapping[str, Any]) -> Any:
    """A dataclass from JSON values: lists become tuples; a field too many or too few is an OptionError."""
    items = {item.name: item for item in dataclasses.fields(kind)}
    required = {
        name
        for name, item in items.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    surplus, missing = sorted(record.keys() - items.keys()), sorted(required - record.keys())
    if surplus or missing:
        raise OptionError(
            f"this is not a {kind.__name__} record of this version: "
            f"missing {', '.join(missing) or 'nothing'}, not known {', '.join(surplus) or 'nothing'}"
        )
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})


def _confidence(chunk: ChunkStats) -> str:
    known = [value for value in chunk.confidences if value is not None]
    return " → ".join(f"{value:.2f}" for value in (known[:1] + known[1:][-1:])) or "-"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"
