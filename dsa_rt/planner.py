"""What a generation will take, in bytes, from the sizes of a bundle and of what is asked of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsa_rt.bundle import Bundle, Manifest
from dsa_rt.bundle.strict import parse
from dsa_rt.cache import cache_bytes
from dsa_rt.codec.conv import ConvCodecConfig
from dsa_rt.codec.tiny import TinyConfig
from dsa_rt.codec.wan_vae import WanVaeConfig
from dsa_rt.errors import OptionError
from dsa_rt.memory import MemoryPlan
from dsa_rt.models.config import WanConfig
from dsa_rt.ops.backend import choose
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import StepPlan
from dsa_rt.sync import STORAGES, sync_bytes, sync_host_bytes

_PACKED = re.compile(
    r"(blocks\.\d+\.(k|self_attn\.[qkvo]|cross_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])|patch_embedding|head\.head)"
    r"\.(weight|bias)"
)
_CODECS: Mapping[str, type[ConvCodecConfig] | type[TinyConfig] | type[WanVaeConfig]] = {
    "conv": ConvCodecConfig, "taehv": TinyConfig, "wan-vae": WanVaeConfig,
}  # fmt: skip


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
        if device.type == "cpu" and choose("linear", "cpu", dtype) == "native":  # packed once more, biases in fp32
            weights += sum(
                entry.numel * (4 if name.endswith("bias") else dtype.itemsize)
                for part in ("generator", "generator_2", "confidence_head")
                for name, entry in bundle.tensors.get(part, {}).items()
                if _PACKED.fullmatch(name)
            )
        return cls(bundle.manifest, model, weights, dtype, device)


@dataclass(frozen=True)
class Run:
    """What is asked of a bundle. height, width [pixels], frames; chunk, window [latent frames]; plans: of a many-step
    run, of those that one compiled function may be asked for; none where passes are decided by the chunk. Then places:
    latent frames that the K/V of a clip has room for; sessions: clips side by side; levels: scheduled passes."""

    height: int
    width: int
    frames: int
    grid: TokenGrid
    chunk: int
    window: int
    guided: bool
    plans: Sequence[StepPlan] = ()
    places: int = 0
    sessions: int = 1
    levels: int = 1

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


def plans_memory(subject: Subject, run: Run, asked: str, policy: str) -> list[MemoryPlan]:
    """The plans to try, in this order: buffers that stay before those of each clip, and what is exact before FP8. K/V
    in host memory come and go layer by layer, in passes that cannot be recorded; see :func:`storages`."""
    return [
        plan_memory(subject, run, storage, held)
        for storage in storages(asked, run, policy)
        for held in (True, False)
        if (held or run.plans) and not (held and storage == "host")
    ]


def plan_memory(subject: Subject, run: Run, storage: str, held: bool = True) -> MemoryPlan:
    """The parts of a run, and the most that is live at once; see :class:`MemoryPlan`.

    K/V, rows and output are exact. Activations and decoding are bounds, counted on small models.
    """
    model, manifest = subject.model, subject.manifest
    sizes = (run.branches, model.layers, model.heads, model.head_dim, subject.dtype, storage, subject.device)
    text, activations, velocities = _prompt_bytes(subject, run), _activation_bytes(subject, run), _row_bytes(model, run)
    text *= run.sessions
    decode, carried = _decode_bytes(subject, run)
    cells = (1 + run.frames // manifest.latent.temporal) * run.height * run.width // manifest.latent.spatial**2
    latents = 4 * manifest.latent.channels * cells
    output = run.frames * run.height * run.width * 3 + latents
    host = 0
    if run.plans:  # made whole, then decoded
        kv = text + max(sync_bytes(plan, *sizes) for plan in run.plans)
        host = max(sync_host_bytes(plan, *sizes) for plan in run.plans)
        own, kept = kv + velocities + activations, 2 * latents  # as rows, and as they are handed out
        live = own + kept + decode if held else max(own + latents, kept + decode)
    else:  # chunk by chunk, which then are joined
        kv = text + cache_bytes(model.layers, run.sessions, run.places, run.grid.tokens, model.dim, subject.dtype)
        live = kv + activations + output * run.sessions + max(decode + carried * (run.sessions - 1), output)
    return MemoryPlan(subject.weights, kv, activations, decode, output, velocities, host, storage, held, live=live)


def _activation_bytes(subject: Subject, run: Run) -> int:
    """Of a many-step run, for each row of a full pass: residual, normed row, query, K, V, output of attention, the
    widest row (q, k and v, or the hidden row of the feed-forward network) and velocity; four fp32 rows where the
    framework norms and turns q and k. On CUDA one more wide row, which the framework's matmul makes. Beside them
    tables of modulation. PyTorch's own attention may add scores of up to 67 MB on a CPU.
    """
    if not run.plans:
        return _engine_bytes(subject, run)
    model, size, kind = subject.model, subject.dtype.itemsize, subject.device.type
    wide = max(3 * model.dim, model.ffn_dim) * (2 if kind == "cuda" else 1)
    row = size * (6 * model.dim + wide + model.velocity_dim)
    if choose("qk_norm_rope_store", kind, subject.dtype) == "torch":
        row += 16 * model.dim
    levels = sum(plan.steps + _experts(subject.manifest) for plan in run.plans)
    tables = 4 * model.dim * (levels * (6 * model.layers + 2) + 2 * model.layers)
    return run.chunk * run.grid.tokens * row + tables


def _engine_bytes(subject: Subject, run: Run) -> int:
    """What :class:`dsa_rt.engine.Engine` holds beside K/V, all of it from compile on. For each row of the largest pass
    (two chunks of each clip): residual, normed row, query, output of attention, the wide row, hidden states for the
    head; latents, positions and rotations. On CUDA one more wide row, which the framework's matmul makes. Then clean
    latents and tables of modulation.
    """
    model, size = subject.model, subject.dtype.itemsize
    head = subject.manifest.confidence_head
    taps = 0 if head is None else len(head["taps"])
    wide = max(3 * model.dim, model.ffn_dim)
    wide *= 2 if subject.device.type == "cuda" else 1
    row = size * ((4 + taps) * model.dim + wide + model.velocity_dim) + 4 * (model.patch_dim + model.head_dim) + 24
    if run.sessions > 1:
        row += 4 * (model.patch_dim + model.head_dim) + 16
    tokens = run.chunk * run.grid.tokens
    clean = 4 * run.sessions * run.places * run.grid.tokens * model.patch_dim
    tables = 4 * model.dim * (model.layers * (6 * (run.levels + 1) + 2) + 8 * (run.levels + 1))
    return 2 * run.sessions * tokens * row + clean + tables + 8 * tokens * model.patch_dim


def _prompt_bytes(subject: Subject, run: Run) -> int:
    """Cross-attention K/V of text and CLIP rows, for each branch of guidance and each expert."""
    model = subject.model
    rows = model.text_length + image_rows(subject.manifest)
    each = 2 * model.layers * rows * model.dim * subject.dtype.itemsize
    return each * run.branches * _experts(subject.manifest)


def _experts(manifest: Manifest) -> int:
    return 1 if manifest.boundary is None else 2


def image_rows(manifest: Manifest) -> int:
    """CLIP rows of an image: its patches and one for all."""
    if manifest.image_encoder is None:
        return 0
    sizes: Mapping[str, Any] = manifest.image_encoder.config
    return 1 + (int(sizes["image_size"]) // int(sizes["patch_size"])) ** 2


def _row_bytes(model: WanConfig, run: Run) -> int:
    """fp32 rows of a many-step run, those of the text encoder too, and its active sets: rotations, numbers, and where
    K/V go. The cache of velocities is after guidance, one for both branches."""
    if not run.plans:
        return 0
    width, extra = model.velocity_dim, model.patch_dim - model.velocity_dim
    extrapolated = any(plan.policy is not None and plan.policy.update == "extrapolated" for plan in run.plans)
    ordered = any(plan.arranged for plan in run.plans)
    kept = 2 * width + extra + (width if extrapolated else 0)  # latents, velocity cache, conditions, slopes
    fresh = (2 if run.guided or extrapolated else 1) * width
    given = (width + extra if extra or ordered else 0) + (extra if ordered else 0)  # gathered, joined with conditions
    tokens, each = run.plans[0].tokens, 4 * model.head_dim + 24
    sets = sum(len(part) * (each + 8) for plan in run.plans for parts in plan.arranged.values() for part in parts)
    text = 4 * run.branches * model.text_length * model.text_dim
    return 4 * tokens * (kept + fresh + given + 8) + each * tokens * len(run.plans) + sets + text


def _decode_bytes(subject: Subject, run: Run) -> tuple[int, int]:
    """Working set of the codec, and what of it the decoder carries on to the next chunk: at most half of its features.

    All pixels of a chunk beside the features of its last latent frame; then all pixels twice (joined; a third time
    where the codec unfolds them), or in dtype, in fp32 and as bytes. Encoding of an image with the rest of its clip in
    grey, in fp32 and in dtype, takes fewer features.
    """
    codec, size = subject.manifest.codec, subject.dtype.itemsize
    kind = None if codec is None else _CODECS.get(codec.kind)
    features, folded = 0, False
    if codec is not None and kind is not None:
        config = parse(kind, codec.config, "manifest.json: codec: config")
        features = config.decode_bytes(run.height, run.width, subject.dtype)
        folded = isinstance(config, WanVaeConfig) and config.patch_size is not None
    frame = 3 * run.height * run.width
    video = frame * min(run.frames, run.chunk * subject.manifest.latent.temporal)
    copies = max((3 if folded else 2) * size, 5 + (size if size < 4 else 0))
    encoded = frame * run.frames * (4 + size) if subject.manifest.image_conditioning == "concat" else 0
    working = max(video * size + features, video * copies + features // 2, encoded + 3 * features // 4)
    return working, features // 2
