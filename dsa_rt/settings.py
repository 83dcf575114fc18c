"""What one compiled function was asked for, checked against what the bundle can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsa_rt.cache import cache_bytes
from dsa_rt.errors import OptionError, PolicyError, ShapeError
from dsa_rt.memory import MemoryPlan, parse_bytes
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import Fixed, Policy, parse_policy
from dsa_rt.schedule import euler_sigmas, few_step_sigmas

if TYPE_CHECKING:
    from dsa_rt.runtime import Runtime


@dataclass(frozen=True)
class Settings:
    """height, width [pixels], frames; latent_frames; chunk_frames, window, sink [latent frames]; sigmas: the level of
    each pass (few-step) or the Euler grid with its final 0 (many-step); guidance: 1 = none."""

    height: int
    width: int
    frames: int
    latent_frames: int
    grid: TokenGrid
    policy: Policy
    causal: bool
    chunk_frames: int
    window: int
    sink: int
    sigmas: tuple[float, ...]
    guidance: float
    plan: MemoryPlan

    @property
    def chunks(self) -> int:
        return self.latent_frames // self.chunk_frames

    @property
    def passes(self) -> int:
        """Scheduled denoise passes of a chunk."""
        return len(self.sigmas) if self.causal else len(self.sigmas) - 1


def settle(
    runtime: Runtime,
    height: int | None,
    width: int | None,
    frames: int | None,
    policy: str | Policy | None,
    window: int | None,
    sink: int | None,
    steps: int | None,
    guidance_scale: float | None,
    memory_limit: int | str | None,
) -> Settings:
    """Defaults filled in, everything checked, memory planned; see ``Runtime.compile`` for arguments and errors."""
    manifest, model = runtime.manifest, runtime.model.config
    causal = model.form == "causal"
    limit = parse_bytes(memory_limit)
    height = _size("height", height, manifest.size.height, manifest.latent.spatial * model.patch[1])
    width = _size("width", width, manifest.size.width, manifest.latent.spatial * model.patch[2])
    frames = _whole("frames", manifest.size.frames if frames is None else frames)
    chunk = manifest.chunk_frames if causal and manifest.chunk_frames else 1
    latent_frames = _latent_frames(frames, manifest.latent.temporal, chunk)
    if causal:
        for name, value in (("steps", steps), ("guidance_scale", guidance_scale)):
            if value is not None:
                raise OptionError(
                    f"{name}={value} was given, but this few-step generator has a fixed schedule and no guidance; "
                    "leave it out (policy chooses the passes), or use a many-step bundle"
                )
        if not isinstance(manifest.schedule.steps, tuple):
            raise OptionError("this causal bundle has no list of timesteps in its schedule; export it again")
        sigmas = few_step_sigmas(manifest.schedule.steps, manifest.schedule.shift)
        guidance = 1.0
        window, sink = _window(window, sink, manifest.window, manifest.sink, manifest.size.frames, latent_frames, chunk,
                               manifest.latent.temporal)  # fmt: skip
    else:
        for name, value in (("window", window), ("sink", sink)):
            if value is not None:
                raise OptionError(
                    f"{name}={value} was given, but this generator sees the whole clip at once; leave it out"
                )
        default = manifest.schedule.steps if isinstance(manifest.schedule.steps, int) else len(manifest.schedule.steps)
        sigmas = euler_sigmas(_whole("steps", default if steps is None else steps), manifest.schedule.shift)
        guidance = manifest.guidance if guidance_scale is None else guidance_scale
        if not isinstance(guidance, int | float) or not 0 <= guidance <= 100:
            raise OptionError(f"guidance_scale is {guidance!r}; expected a number from 0 to 100 (1 = no guidance)")
        chunk, window, sink = latent_frames, latent_frames, 0
    chosen = _policy(policy, causal, runtime.head is not None)
    grid = TokenGrid(
        height // (manifest.latent.spatial * model.patch[1]), width // (manifest.latent.spatial * model.patch[2]),
        model.patch,
    )  # fmt: skip
    settings = Settings(
        height, width, frames, latent_frames, grid, chosen, causal, chunk, window, sink, tuple(sigmas), guidance,
        _plan(runtime, height, width, frames, grid, chunk, window, causal, guidance),
    )  # fmt: skip
    settings.plan.check(limit, runtime.device)
    return settings


def _whole(name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise OptionError(f"{name} is {value!r}; expected a whole number of 1 or more")
    return value


def _size(name: str, value: int | None, default: int, step: int) -> int:
    value = _whole(name, default if value is None else value)
    if value % step:
        below = value // step * step
        near = f"{below} or {below + step}" if below else f"{step}"
        raise ShapeError(f"{name} {value} is not a multiple of {step} (codec times patch); {near} would be")
    return value


def _latent_frames(frames: int, temporal: int, chunk: int) -> int:
    """Latent frames of a clip; the first stands for one frame, each later one for ``temporal``."""
    count = 1 + -(-(frames - 1) // temporal)
    up = -(-count // chunk) * chunk
    nearest = [1 + temporal * (n - 1) for n in (up - chunk, up) if n > 0]
    if frames not in nearest:
        shown = " or ".join(map(str, nearest))
        raise ShapeError(
            f"{frames} frames cannot be made in whole chunks: the first latent frame is one frame, later ones are "
            f"{temporal}, and a chunk has {chunk} of them; {shown} would do"
        )
    return 1 + (frames - 1) // temporal


def _window(
    window: int | None, sink: int | None, default_window: int | None, default_sink: int | None, native_frames: int,
    latent_frames: int, chunk: int, temporal: int,
) -> tuple[int, int]:  # fmt: skip
    native = 1 + (native_frames - 1) // temporal
    if window is None:
        window = min(latent_frames, default_window or native)
        sink = (default_sink or 0) if sink is None and latent_frames > window else sink
    window, sink = _whole("window", window), 0 if sink is None else sink
    if type(sink) is not int or sink < 0 or window < sink + chunk:
        raise OptionError(
            f"window {window} with sink {sink!r} does not hold a chunk of {chunk} latent frames beside the sink; "
            f"expected sink >= 0 and window >= sink + {chunk}"
        )
    return window, sink  # a window longer than the clip is for sessions without end


def _policy(policy: str | Policy | None, causal: bool, has_head: bool) -> Policy:
    chosen = parse_policy(policy if policy is not None else "dsa" if causal and has_head else "dense")
    if not causal and chosen != Fixed():
        raise PolicyError(
            f"policy {chosen.name} decides passes per chunk, but this many-step generator makes the whole clip at "
            "once; use policy='dense' with it, or a few-step bundle such as 'demo'"
        )
    return chosen


def _plan(
    runtime: Runtime, height: int, width: int, frames: int, grid: TokenGrid, chunk: int, window: int, causal: bool,
    guidance: float,
) -> MemoryPlan:  # fmt: skip
    model, dtype = runtime.model.config, runtime.dtype
    modules = (runtime.model, runtime.head, runtime.codec, runtime.text_encoder)
    weights = sum(t.nbytes for m in modules if m is not None for t in m.state_dict().values())
    text_kv = 2 * model.layers * model.text_length * model.dim * dtype.itemsize * (1 if guidance == 1 else 2)
    kv = cache_bytes(model.layers, 1, window, grid.tokens, model.dim, dtype) if causal else 0
    active = chunk * grid.tokens
    # Residual, normed row, q, k, v and attention output in dtype, norms in fp32, and the wide feed-forward row.
    activations = active * (6 * model.dim * dtype.itemsize + 4 * model.dim * 4 + 2 * model.ffn_dim * dtype.itemsize)
    latent = runtime.manifest.latent
    chunk_pixels = chunk * latent.temporal * height * width * 3
    decode = chunk_pixels * (dtype.itemsize + 4 + 1) + height * width * 64 * dtype.itemsize
    latents = (1 + frames // latent.temporal) * height * width // latent.spatial**2 * latent.channels * 4
    return MemoryPlan(weights, kv + text_kv, activations, decode, frames * height * width * 3 + latents)
