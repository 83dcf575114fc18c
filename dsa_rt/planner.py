"""What a generation will take, in bytes, from the sizes of a bundle and of what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsa_rt.bundle import Bundle, Manifest
from dsa_rt.cache import cache_bytes
from dsa_rt.errors import OptionError
from dsa_rt.memory import MemoryPlan
from dsa_rt.models.wan import WanConfig
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import StepPlan
from dsa_rt.sync import STORAGES, sync_bytes, sync_host_bytes


@dataclass(frozen=True)
class Subject:
    """The bundle that a plan is for, on a device that need not be there. weights: bytes of all its parts."""

    manifest: Manifest
    model: WanConfig
    weights: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, bundle: Bundle, model: WanConfig, dtype: torch.dtype, device: torch.device) -> Subject:
        """From a bundle that is not loaded: its weights as they will be, see :func:`dsa_rt.runtime.load`."""
        text = bundle.manifest.text_encoder
        wide = {"image_encoder"} | ({"text_encoder"} if text is not None and text.kind == "demo-grammar" else set())
        weights = sum(
            entry.numel * (4 if part in wide else dtype.itemsize)
            for part, entries in bundle.tensors.items()
            for entry in entries.values()
        )
        return cls(bundle.manifest, model, weights, dtype, device)


@dataclass(frozen=True)
class Run:
    """What is asked of a bundle. height, width [pixels], frames; chunk, window [latent frames]; plans: of a many-step
    run, of those that one compiled function may be asked for; none where passes are decided by the chunk."""

    height: int
    width: int
    frames: int
    grid: TokenGrid
    chunk: int
    window: int
    guided: bool
    plans: Sequence[StepPlan] = ()

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1


def storages(asked: str, run: Run, policy: str) -> tuple[str, ...]:
    """The K/V storages to try, in this order. asked: "auto" or one by name, which is refused where it would mean
    nothing."""
    if asked not in ("auto", *STORAGES):
        raise OptionError(f"kv_storage is {asked!r}; expected 'auto', {', '.join(map(repr, STORAGES))}")
    if any(plan.kept_rows for plan in run.plans):
        return STORAGES if asked == "auto" else (asked,)
    if asked not in ("auto", "model"):
        raise OptionError(
            f"kv_storage={asked!r} is for runs that keep K/V from step to step in which some tokens are skipped, but "
            f"policy {policy} does not; leave it out, or use a policy such as 'hsa-50' with a many-step bundle"
        )
    return ("model",)


def plan_memory(subject: Subject, run: Run, storage: str) -> MemoryPlan:
    """Everything that is live at once, part by part; see :class:`MemoryPlan`."""
    model, dtype = subject.model, subject.dtype
    sizes = (run.branches, model.layers, model.heads, model.head_dim, dtype, storage, subject.device)
    host = 0
    if run.plans:
        kv = max(sync_bytes(plan, *sizes) for plan in run.plans)
        host = max(sync_host_bytes(plan, *sizes) for plan in run.plans)
    else:
        kv = cache_bytes(model.layers, 1, run.window, run.grid.tokens, model.dim, dtype)
    tokens = run.chunk * run.grid.tokens
    # Residual, normed row, q, k, v and attention output in dtype, norms in fp32, and the wide feed-forward row.
    row = 6 * model.dim * dtype.itemsize + 4 * model.dim * 4 + 2 * model.ffn_dim * dtype.itemsize
    latent = subject.manifest.latent
    latents = (1 + run.frames // latent.temporal) * run.height * run.width // latent.spatial**2 * latent.channels * 4
    return MemoryPlan(
        subject.weights, kv + _prompt_bytes(subject, run), tokens * row, _codec_bytes(subject, run),
        run.frames * run.height * run.width * 3 + latents, _row_bytes(model, run), host, storage,
    )  # fmt: skip


def _prompt_bytes(subject: Subject, run: Run) -> int:
    """Cross-attention K/V of text and CLIP rows, for each branch of guidance and each expert."""
    model = subject.model
    rows = model.text_length + _image_rows(subject.manifest)
    experts = 1 if subject.manifest.boundary is None else 2
    return 2 * model.layers * rows * model.dim * subject.dtype.itemsize * run.branches * experts


def _image_rows(manifest: Manifest) -> int:
    """CLIP rows of an image: its patches and one for all."""
    if manifest.image_encoder is None:
        return 0
    sizes: Mapping[str, Any] = manifest.image_encoder.config
    return 1 + (int(sizes["image_size"]) // int(sizes["patch_size"])) ** 2


def _row_bytes(model: WanConfig, run: Run) -> int:
    """fp32 rows of a many-step run, and the rotations of its active sets. The cache of velocities is after guidance,
    one for both branches."""
    if not run.plans:
        return 0
    width, extra = model.velocity_dim, model.patch_dim - model.velocity_dim
    extrapolated = any(plan.policy is not None and plan.policy.update == "extrapolated" for plan in run.plans)
    kept = 2 * width + extra + (width if extrapolated else 0)  # latents, velocity cache, conditions, slopes
    fresh = (4 if run.guided or extrapolated else 1) * width  # both branches, their difference, their mix
    ordered = any(plan.kept_rows for plan in run.plans)
    given = (width if ordered else 0) + (width + 2 * extra if extra else 0)  # gathered, and joined with conditions
    sets = 3 if ordered else 1  # in token order; all and some in that of groups
    return 4 * run.plans[0].tokens * (kept + fresh + given + sets * model.head_dim)


def _codec_bytes(subject: Subject, run: Run) -> int:
    """Pixels of a chunk as the decoder has them, in fp32 and as bytes, and features at the resolution of pixels. An
    image is encoded with the rest of its clip in grey."""
    size, pixels = subject.dtype.itemsize, run.height * run.width
    frames = run.chunk * subject.manifest.latent.temporal
    conditioned = subject.manifest.image_conditioning != "none"
    working = max(frames * 3 * (size + 4 + 1), run.frames * 3 * (size + 4) if conditioned else 0)
    return pixels * (working + _feature_bytes(subject.manifest, size))


def _feature_bytes(manifest: Manifest, size: int) -> int:
    """Of a pixel, while one latent frame is decoded or encoded."""
    if manifest.codec is None or manifest.codec.kind != "wan-vae":
        return 64 * size
    # What both published codecs were measured to hold at their peak, in rows as wide as their last stage: four frames
    # in several tensors, and the two frames that each of its convolutions carries.
    sizes: Mapping[str, Any] = manifest.codec.config
    width, patch = int(sizes.get("decoder_base_dim") or sizes["base_dim"]), int(sizes.get("patch_size") or 1)
    return -(-(80 if sizes.get("is_residual") else 48) * width * size // patch**2)
