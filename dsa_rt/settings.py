"""What one compiled function was asked for, checked against what the bundle can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dsa_rt.bundle import Bundle, Manifest, Part
from dsa_rt.errors import OptionError, PolicyError, ShapeError
from dsa_rt.memory import MemoryPlan, choose, parse_bytes
from dsa_rt.models.config import WanConfig
from dsa_rt.ops.layers import packed_bytes
from dsa_rt.plan import TokenGrid
from dsa_rt.planner import Run, Subject, plans_memory
from dsa_rt.policy import HSA, Fixed, Policy, StepPlan, parse_policy
from dsa_rt.sampler.ode import switch_step
from dsa_rt.schedule import euler_sigmas, few_step_sigmas

if TYPE_CHECKING:
    from dsa_rt.runtime import Runtime


@dataclass(frozen=True)
class Settings:
    """height, width [pixels], frames; latent_frames; chunk_frames, window, sink [latent frames]; sigmas: the level of
    each pass (few-step) or the Euler grid with its final 0 (many-step); guidance: 1 = none; token_plan: what each step
    of a many-step run computes, None where passes are decided by the chunk; image_plan: the same for a run whose first
    frame is given in place of noise, None where there is no such run; guidance_2: of the second expert, None where
    there is one generator; places: latent frames that the K/V of a clip has room for; sessions: clips side by side."""

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
    token_plan: StepPlan | None = None
    image_plan: StepPlan | None = None
    guidance_2: float | None = None
    places: int = 0
    sessions: int = 1

    @property
    def guided(self) -> bool:
        """Whether passes have two branches, with the prompt and without: all or none, whichever expert wants them."""
        return self.guidance != 1 or self.guidance_2 not in (None, 1)

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
    kv_storage: str = "auto",
    guidance_scale_2: float | None = None,
    sessions: int = 1,
) -> Settings:
    """Defaults filled in, everything checked, memory planned; see ``Runtime.compile`` for arguments and errors."""
    manifest, model = runtime.manifest, runtime.model.config
    causal = model.form == "causal"
    limit, sessions = parse_bytes(memory_limit), _whole("sessions", sessions)
    if sessions > 1 and not causal:
        raise OptionError(
            f"sessions={sessions} is for autoregressive bundles, whose clips can share passes; this generator makes "
            "one clip at a time: leave it out"
        )
    height = _size("height", height, manifest.size.height, manifest.latent.spatial * model.patch[1])
    width = _size("width", width, manifest.size.width, manifest.latent.spatial * model.patch[2])
    frames = _whole("frames", manifest.size.frames if frames is None else frames)
    chunk = manifest.chunk_frames if causal and manifest.chunk_frames else 1
    latent_frames = _latent_frames(frames, manifest.latent.temporal, chunk)
    chosen = _policy(policy, causal, runtime.head is not None)
    grid = _grid(manifest, model, height, width)
    token_plan = image_plan = guidance_2 = None
    if causal:
        for name, value in (("steps", steps), ("guidance_scale", guidance_scale),
                            ("guidance_scale_2", guidance_scale_2)):  # fmt: skip
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
        token_plan, image_plan = _token_plans(manifest, chosen, steps, grid, latent_frames)
        sigmas = euler_sigmas(token_plan.steps, manifest.schedule.shift)
        guidance = _guidance("guidance_scale", manifest.guidance if guidance_scale is None else guidance_scale)
        if manifest.boundary is not None:
            guidance_2 = guidance if guidance_scale_2 is None else _guidance("guidance_scale_2", guidance_scale_2)
        elif guidance_scale_2 is not None:
            raise OptionError(
                f"guidance_scale_2={guidance_scale_2} is for the second of two experts, but bundle {manifest.name!r} "
                "has one generator; leave it out"
            )
        chunk, window, sink = latent_frames, latent_frames, 0
    # Beyond the window, room for a chunk more: it lets context pass and first pass run as one.
    places = window + chunk if causal and latent_frames > window else window
    weights = sum(
        packed_bytes(module) + sum(t.nbytes for t in module.state_dict().values()) for module in runtime.modules
    )
    codec = Part(runtime.codec.kind, runtime.codec.to_dict())  # another than the bundle's where load was given one
    subject = Subject(replace(manifest, codec=codec), model, weights, runtime.dtype, runtime.device)
    plans = [plan for plan in (token_plan, image_plan) if plan is not None]
    run = Run(height, width, frames, grid, chunk, window, guidance != 1 or guidance_2 not in (None, 1), plans,
              places, sessions, len(sigmas))  # fmt: skip
    memory = plans_memory(subject, run, kv_storage, chosen.name)
    return Settings(
        height, width, frames, latent_frames, grid, chosen, causal, chunk, window, sink, tuple(sigmas), guidance,
        choose(memory, limit, runtime.device), token_plan, image_plan, guidance_2, places, sessions,
    )  # fmt: skip


@dataclass(frozen=True)
class Preview:
    """What a many-step run will compute and take."""

    policy: Policy
    token_plan: StepPlan
    memory: MemoryPlan


def preview(
    bundle: Bundle, policy: str | Policy, *, height: int | None = None, width: int | None = None,
    frames: int | None = None, steps: int | None = None, kv_storage: str = "auto",
    memory_limit: int | str | None = None, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
) -> Preview:  # fmt: skip
    """Of a bundle that is not loaded, on a device that need not be there; errors as in :func:`settle`. Of memory only
    the limit counts, as what is free here and now says nothing about then and there."""
    manifest, model = bundle.manifest, bundle.config("architecture", WanConfig)
    if model.form == "causal":
        raise PolicyError(
            f"policy {policy!r}: there is nothing to plan ahead for an autoregressive bundle, whose policies decide "
            "while they run; leave it out, or name a many-step bundle such as 'demo-many-step'"
        )
    limit, place = parse_bytes(memory_limit), torch.device(device)
    chosen = _policy(policy, causal=False, has_head=False)
    height = _size("height", height, manifest.size.height, manifest.latent.spatial * model.patch[1])
    width = _size("width", width, manifest.size.width, manifest.latent.spatial * model.patch[2])
    frames = _whole("frames", manifest.size.frames if frames is None else frames)
    latent_frames = _latent_frames(frames, manifest.latent.temporal, 1)
    grid = _grid(manifest, model, height, width)
    token_plan, image_plan = _token_plans(manifest, chosen, steps, grid, latent_frames)
    plans = [token_plan] if image_plan is None else [token_plan, image_plan]
    run = Run(height, width, frames, grid, latent_frames, latent_frames, manifest.guidance != 1, plans)
    subject = Subject.of(bundle, model, dtype, place)
    memory = plans_memory(subject, run, kv_storage, chosen.name)
    return Preview(chosen, token_plan, choose(memory, limit, place, here=False))


def _token_plans(
    manifest: Manifest, policy: Policy, steps: int | None, grid: TokenGrid, latent_frames: int
) -> tuple[StepPlan, StepPlan | None]:
    """Of a run without condition tokens, and of one whose first latent frame is given; None where none can be."""
    plan = _token_plan(manifest, policy, steps, grid, latent_frames, 0)
    if manifest.image_conditioning != "first-frame" or latent_frames == 1:
        return plan, None
    return plan, _token_plan(manifest, policy, steps, grid, latent_frames, grid.tokens)


def _token_plan(
    manifest: Manifest, policy: Policy, steps: int | None, grid: TokenGrid, latent_frames: int, fixed: int
) -> StepPlan:
    """steps: as the user asks; else as the policy has them, else the bundle. fixed: tokens that are conditions."""
    default = manifest.schedule.steps if isinstance(manifest.schedule.steps, int) else len(manifest.schedule.steps)
    tokens = latent_frames * grid.tokens
    if not isinstance(policy, HSA):
        return StepPlan.dense(_whole("steps", default if steps is None else steps), tokens, fixed)
    steps = _whole("steps", policy.steps or default if steps is None else steps)
    full = expert_steps(manifest, euler_sigmas(steps, manifest.schedule.shift))
    return policy.plan(steps, tokens, grid.tokens, fixed=fixed, full=full)


def expert_steps(manifest: Manifest, sigmas: Sequence[float]) -> tuple[int, ...]:
    """Steps at which other weights take over, and all tokens must be computed."""
    return () if manifest.boundary is None else (switch_step(sigmas, manifest.boundary),)


def _grid(manifest: Manifest, model: WanConfig, height: int, width: int) -> TokenGrid:
    spatial = manifest.latent.spatial
    return TokenGrid(height // (spatial * model.patch[1]), width // (spatial * model.patch[2]), model.patch)


def _whole(name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise OptionError(f"{name} is {value!r}; expected a whole number of 1 or more")
    return value


def _guidance(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 100:
        raise OptionError(f"{name} is {value!r}; expected a number from 0 to 100 (1 = no guidance)")
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
    if not causal and chosen != Fixed() and not isinstance(chosen, HSA):
        raise PolicyError(
            f"policy {chosen.name} decides passes per chunk, but this many-step generator makes the whole clip at "
            "once; use policy='dense' or 'hsa-50' with it, or a few-step bundle such as 'demo'"
        )
    return chosen
