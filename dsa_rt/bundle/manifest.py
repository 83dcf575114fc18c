"""What a bundle's manifest.json says, as dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dsa_rt.bundle.strict import OPTIONAL, load_json, parse, short
from dsa_rt.errors import BundleError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# Relative, with plain names only: no "..", no leading dot or slash, no drive, no backslash.
_SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)


@dataclass(frozen=True)
class Schedule:
    """Noise levels. steps: the timesteps of a few-step generator before the shift, falling, for example
    (1000, 750, 500, 250); or the number of steps of a many-step one."""

    shift: float
    steps: int | tuple[float, ...]
    train_timesteps: int = 1000
    kind: Literal["flow"] = "flow"

    def __post_init__(self) -> None:
        _require(self.shift > 0, f"shift is {self.shift}; expected a number above 0")
        _require(self.train_timesteps >= 1, f"train_timesteps is {self.train_timesteps}; expected at least 1")
        if isinstance(self.steps, int):
            _require(1 <= self.steps <= 1000, f"steps is {self.steps}; expected 1 to 1000")
            return
        falling = all(a > b for a, b in itertools.pairwise(self.steps))
        _require(
            len(self.steps) > 0 and falling and self.steps[-1] > 0 and self.steps[0] <= self.train_timesteps,
            f"steps are {short(list(self.steps))}; expected falling timesteps in (0, {self.train_timesteps}]",
        )


@dataclass(frozen=True)
class Latent:
    """The codec's latents: channels, their mean and standard deviation (both None when the codec normalises
    its latents itself), and how many pixels (spatial) and frames (temporal) one latent stands for."""

    channels: int
    spatial: int
    temporal: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "spatial", "temporal"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected at least 1")
        _require((self.mean is None) == (self.std is None), "mean and std: expected both or neither")
        for values in (self.mean, self.std):
            sized = values is None or len(values) == self.channels
            _require(sized, f"mean or std has {len(values or ())} values for {self.channels} channels")
        _require(all(value > 0 for value in self.std or ()), "std has a value that is not above 0")


@dataclass(frozen=True)
class Size:
    """The video the generator was trained for, in pixels and frames."""

    height: int
    width: int
    frames: int

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Part:
    """A codec or text encoder: the kind its registry knows, and the configuration that kind understands."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: path with forward slashes relative to the bundle, lower-case SHA-256, size."""

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        safe = len(self.path) <= 200 and _SAFE_PATH.fullmatch(self.path)
        _require(
            bool(safe),
            f"path {short(self.path)} is not a plain path inside the bundle and was not opened; "
            "do not use this bundle unless you trust its author, and export it again",
        )
        known = self.path.endswith((".safetensors", ".json"))
        _require(
            known, f"{short(self.path)} is neither a .safetensors nor a .json file, and no other kind is read"
        )
        _require(
            re.fullmatch("[0-9a-f]{64}", self.sha256) is not None,
            f"sha256 of {self.path} is not 64 hex digits",
        )
        _require(self.bytes >= 0, f"bytes of {self.path} is {self.bytes}; expected a size")


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but its tensors.

    architecture: {"kind": "wan", ...}, the rest being the model's own configuration (see Bundle.config).
    codec, text_encoder: None where the bundle was exported without one; it cannot be loaded then.
    confidence_head: the head's configuration, None without a head.
    chunk_frames, window, sink: latent frames; window and sink are defaults, None = unlimited and none.
    guidance: default guidance scale, 1 = none.  fps: frames per second of the video.
    calibration: None or {"passes": T, "levels": {"1": {"confidence": [...], "gain": [...]}, ...}, ...};
        level n holds what the head said after pass n (rising) and what further passes then changed,
        in a calibration run; other keys are free.
    training: free notes.  files: filled in when the bundle is written.

    Of later versions, so that a manifest may lack them:
    boundary: with two experts (generator and generator_2), the part of train_timesteps from which on the first
        is used, as boundary_ratio in diffusers; below it the second is. None with one generator.
    image_conditioning: what a first frame is given to: "none", "concat" (mask and latents on further input
        channels; needs an image), "first-frame" (clean tokens in place of noisy ones; may have an image).
    image_encoder: encoder of the image rows that cross-attention reads; None without such rows.
    """

    name: str
    architecture: dict[str, Any]
    schedule: Schedule
    latent: Latent
    size: Size
    codec: Part | None
    text_encoder: Part | None
    fps: float = 16.0
    chunk_frames: int | None = None
    window: int | None = None
    sink: int | None = None
    guidance: float = 1.0
    confidence_head: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    created_by: str = "dsa_rt"
    prediction: Literal["velocity"] = "velocity"
    files: tuple[FileEntry, ...] = ()
    format_version: int = FORMAT_VERSION
    boundary: float | None = field(default=None, metadata=OPTIONAL)
    image_conditioning: Literal["none", "concat", "first-frame"] = field(default="none", metadata=OPTIONAL)
    image_encoder: Part | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        for name in ("name", "created_by"):
            text = getattr(self, name)
            _require(
                0 < len(text) <= 200 and text.isprintable(),
                f"{name} is {short(text)}; expected a line of text",
            )
        _require(
            isinstance(self.architecture.get("kind"), str),
            'architecture has no "kind"; expected text such as "wan"',
        )
        _require(self.fps > 0, f"fps is {self.fps}; expected a number above 0")
        _require(self.guidance >= 0, f"guidance is {self.guidance}; expected 0 or more (1 = no guidance)")
        for name, least in (("chunk_frames", 1), ("window", 1), ("sink", 0)):
            value = getattr(self, name)
            _require(
                value is None or value >= least,
                f"{name} is {value}; expected null or {least} or more latent frames",
            )
        if self.window is not None and self.sink is not None:
            _require(
                self.sink < self.window,
                f"sink is {self.sink} and window {self.window}; the sink is part of the window",
            )
        if self.architecture.get("form") == "causal":
            _require(self.chunk_frames is not None, "chunk_frames is null; a causal generator needs it")
        _require(
            self.boundary is None or 0 < self.boundary < 1,
            f"boundary is {self.boundary}; expected null or a part of the timesteps between 0 and 1",
        )
        _require(
            self.image_encoder is None or self.image_conditioning == "concat",
            f'image_encoder is given, but image_conditioning is "{self.image_conditioning}"; expected "concat"',
        )
        paths: set[str] = set()
        for entry in self.files:
            _require(entry.path not in paths, f"files lists {entry.path!r} twice")
            paths.add(entry.path)
        if self.calibration is not None:
            _check_calibration(self.calibration)

    @staticmethod
    def from_json(text: bytes) -> Manifest:
        """Strict inverse of to_json; raises BundleError."""
        value = load_json(text, MANIFEST)
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION or type(version) is not int:
            raise BundleError(
                f"{MANIFEST} has format_version {short(version)}; this dsa_rt reads {FORMAT_VERSION}: "
                "update dsa_rt, or export the bundle again"
            )
        return parse(Manifest, value, MANIFEST)

    def to_json(self) -> bytes:
        """One key a line, so that people can read it in spite of long calibration lists."""
        try:
            members = {"format_version": self.format_version} | dataclasses.asdict(self)
            lines = [
                f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in members.items()
            ]
        except (TypeError, ValueError, RecursionError) as error:
            raise BundleError(f"the manifest cannot be written as JSON: {error}") from error
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _check_calibration(calibration: dict[str, Any]) -> None:
    passes, levels = calibration.get("passes"), calibration.get("levels")
    _require(
        type(passes) is int and passes >= 1, f"calibration: passes is {short(passes)}; expected 1 or more"
    )
    assert isinstance(passes, int)
    known = [str(n) for n in range(1, min(passes, 1000) + 1)]
    if not isinstance(levels, dict) or not levels or not set(levels) <= set(known):
        raise BundleError(
            f"calibration: levels are {short(levels)}; expected an object with keys of 1 to {passes}"
        )
    for number, level in levels.items():
        if not isinstance(level, dict) or not {"confidence", "gain"} <= set(level):
            raise BundleError(f"calibration: level {number} is {short(level)}; expected confidence and gain")
        for name, values in level.items():
            numbers = isinstance(values, (list, tuple)) and all(
                type(value) in (int, float) and math.isfinite(value) for value in values
            )
            _require(
                numbers and len(values) > 0,
                f"calibration: level {number}: {short(name)} is not a list of finite numbers",
            )
        confidence = level["confidence"]
        rising = all(a <= b for a, b in itertools.pairwise(confidence))
        _require(
            rising and confidence[0] >= 0 and confidence[-1] <= 1,
            f"calibration: level {number}: confidence is not sorted from 0 to 1; calibrate the head again",
        )
