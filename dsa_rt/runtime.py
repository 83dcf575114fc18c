"""Loading a bundle and compiling it into a ``generate`` function."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dsa_rt.bundle import Bundle, Manifest, describe, open_bundle
from dsa_rt.codec import build
from dsa_rt.codec.conv import ConvCodec
from dsa_rt.codec.tiny import TinyCodec, TinyDecoded, load_tiny
from dsa_rt.errors import BundleError, MemoryLimitError, OptionError
from dsa_rt.generate import Generate
from dsa_rt.memory import free_memory
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.policy import Policy
from dsa_rt.progress import Event
from dsa_rt.schedule import TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from dsa_rt.codec import AnyCodec, AnyTextEncoder, ImageEncoder, TextEncoder, VideoCodec
    from dsa_rt.codec.clip import ClipVisionEncoder

DEMOS = {"demo": "streaming", "demo-many-step": "many-step"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_bundle(name: str | os.PathLike[str]) -> Path:
    """The folder of a bundle: "demo" and "demo-many-step" come with the package, anything else is a path."""
    if isinstance(name, str) and name in DEMOS:
        return Path(__file__).parent / "demo" / "bundles" / DEMOS[name]
    return Path(name)


def load(
    bundle: str | os.PathLike[str] = "demo", device: str | torch.device = "cpu", dtype: str = "auto",
    verify_hashes: bool = True, decoder: str | os.PathLike[str] | None = None,
) -> Runtime:  # fmt: skip
    """Open a bundle and put its weights on a device.

    bundle: a bundle's folder, or "demo" (few-step, autoregressive) or "demo-many-step". device: "cpu", "cuda",
    "cuda:1" … dtype: "fp32", "bf16", "fp16", or "auto": bf16 where the device multiplies it natively, else fp32.
    decoder: a tiny decoder in the TAEHV layout (a safetensors file or the folder of one) that decodes in place of the
    bundle's codec. Raises BundleError (before memory is taken), OptionError.
    """
    opened = open_bundle(find_bundle(bundle), verify_hashes)
    place, number = _device(device), dtype_for(dtype, device)
    manifest = opened.manifest
    if manifest.architecture["kind"] != "wan":
        kind = manifest.architecture["kind"]
        raise BundleError(f"bundle '{opened.path}': architecture {kind!r} is unknown; expected 'wan'")
    parts = _build(opened, encodes=decoder is None or manifest.image_conditioning != "none")
    dtypes = dict.fromkeys(parts, number)
    dtypes["text_encoder"] = cast("TextEncoder", parts["text_encoder"]).dtype_for(number)
    dtypes["image_encoder"] = torch.float32  # once a clip, and what the generator was trained with
    _check_memory(opened, {name: dtypes[name] for name in parts}, place)
    tiny = None if decoder is None else load_tiny(Path(decoder), place, number)
    _check_fit(opened, parts, tiny)
    for component, module in parts.items():
        opened.expect(component, {name: tuple(t.shape) for name, t in module.state_dict().items()})
    for component, module in parts.items():
        module.load_state_dict(opened.load(component, place, dtypes[component]), assign=True)
        module.to(place).requires_grad_(False).eval()
        if isinstance(module, WanModel | ConfidenceHead):
            module.prepare()
    found: dict[str, Any] = dict(parts)
    codec: Any = found.get("codec")
    if isinstance(codec, ConvCodec):
        codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it alone
    if tiny is not None:
        codec = tiny if codec is None else TinyDecoded(codec, tiny)
    return Runtime(
        opened, found["generator"], found.get("confidence_head"), codec, found["text_encoder"], place, number,
        found.get("generator_2"), found.get("image_encoder"),
    )  # fmt: skip


def _build(bundle: Bundle, encodes: bool) -> dict[str, nn.Module]:
    """The modules that a bundle describes, by component, without weights. encodes: whether its codec is needed."""
    parts: dict[str, nn.Module] = {}
    config = bundle.config("architecture", WanConfig)
    with torch.device("meta"):
        parts["generator"] = WanModel(config)
        if bundle.manifest.boundary is not None:
            parts["generator_2"] = WanModel(config)
        if bundle.manifest.confidence_head is not None:
            head = parts["confidence_head"] = ConfidenceHead(bundle.config("confidence_head", ConfidenceConfig))
            if head.config.dim != config.dim or head.config.taps[-1] >= config.layers:
                raise BundleError(
                    f"bundle '{bundle.path}': confidence_head taps {head.config.taps} of width {head.config.dim} do "
                    f"not fit a generator of {config.layers} blocks of width {config.dim}"
                )
    if encodes:
        parts["codec"] = build(bundle, "codec")
    parts["text_encoder"] = build(bundle, "text_encoder")
    if bundle.manifest.image_encoder is not None:
        parts["image_encoder"] = build(bundle, "image_encoder")
    return parts


def _check_memory(bundle: Bundle, dtypes: Mapping[str, torch.dtype], place: torch.device) -> None:
    entries = [(e.numel, dtypes[part]) for part in dtypes for e in bundle.tensors.get(part, {}).values()]
    need, free = sum(count * dtype.itemsize for count, dtype in entries), free_memory(place)
    if free is not None and need > free:
        raise MemoryLimitError(
            f"the weights of '{bundle.path}' need {need / 1e6:.1f} MB as {dtypes['generator']}, but {free / 1e6:.1f} "
            f"MB are free on {place}; a smaller dtype or bundle needs less"
        )


def _check_fit(bundle: Bundle, parts: Mapping[str, nn.Module], tiny: TinyCodec | None) -> None:
    """:class:`BundleError` where parts of a bundle have sizes that do not go together."""
    manifest, latent = bundle.manifest, bundle.manifest.latent
    model = cast(WanModel, parts["generator"]).config
    text = cast("TextEncoder", parts["text_encoder"])
    if latent.mean is not None or manifest.schedule.train_timesteps != TRAIN_TIMESTEPS:
        raise BundleError(
            f"bundle '{bundle.path}': this version reads latents that the codec normalises itself (mean, std null) "
            f"and train_timesteps {TRAIN_TIMESTEPS}; export it that way"
        )
    extra = latent.channels + latent.temporal if manifest.image_conditioning == "concat" else 0
    pairs = [
        ("generator in_channels", model.in_channels, "latent plus condition channels", latent.channels + extra),
        ("generator out_channels", model.out_channels, "latent channels", latent.channels),
        ("generator text_dim", model.text_dim, "text_encoder dim", text.dim),
        ("generator text_length", model.text_length, "text_encoder length", text.length),
    ]
    for name, codec in (("codec", cast("VideoCodec | None", parts.get("codec"))), ("decoder", tiny)):
        if codec is not None:
            pairs += [
                ("latent channels", latent.channels, f"{name} channels", codec.latent_channels),
                ("latent spatial", latent.spatial, f"{name} spatial factor", codec.spatial_factor),
                ("latent temporal", latent.temporal, f"{name} temporal factor", codec.temporal_factor),
            ]
    image = cast("ImageEncoder | None", parts.get("image_encoder"))
    if (image is None) != (model.image_dim is None):
        raise BundleError(
            f"bundle '{bundle.path}': generator image_dim is {model.image_dim}, but the bundle has "
            f"{'no' if image is None else 'an'} image_encoder; export it again with --components and a folder with one"
        )
    if image is not None:
        pairs.append(("generator image_dim", model.image_dim or 0, "image_encoder dim", image.dim))
    for name, value, other, expected in pairs:
        if value != expected:
            raise BundleError(
                f"bundle '{bundle.path}': {name} is {value} but {other} is {expected}; its parts do not belong together"
            )


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device {device!r} is unknown; expected 'cpu', 'cuda' or 'cuda:N'") from error
    if place.type not in ("cpu", "cuda"):
        raise OptionError(f"device {str(device)!r} is not supported; expected 'cpu', 'cuda' or 'cuda:N'")
    if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
        raise OptionError(f"device {str(device)!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return place


def dtype_for(dtype: str, device: str | torch.device) -> torch.dtype:
    """The number format that :func:`load` takes for a name, "auto" included."""
    if dtype == "auto":
        native = torch.device(device).type == "cuda" or _cpu_multiplies_bf16()
        return torch.bfloat16 if native else torch.float32
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r} is unknown; expected 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[dtype]


def _cpu_multiplies_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            flags = next((line for line in info if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass(frozen=True)
class Runtime:
    """Weights on a device. Nothing in it changes; any number of compiled functions and threads may share it.

    model_2: the expert for timesteps below ``manifest.boundary``; None with one generator. image_encoder: what makes
    the image rows of a generator that reads them.
    """

    bundle: Bundle
    model: WanModel
    head: ConfidenceHead | None
    codec: AnyCodec
    text_encoder: AnyTextEncoder
    device: torch.device
    dtype: torch.dtype
    model_2: WanModel | None = None
    image_encoder: ClipVisionEncoder | None = None

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def modules(self) -> list[nn.Module]:
        """All parts that hold weights."""
        parts = (self.model, self.model_2, self.head, self.codec, self.text_encoder, self.image_encoder)
        return [part for part in parts if part is not None]

    def describe(self) -> dict[str, Any]:
        """What the bundle holds, JSON-ready."""
        return describe(self.bundle)

    def compile(
        self,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        policy: str | Policy | None = None,
        *,
        window: int | None = None,
        sink: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        memory_limit: int | str | None = None,
        kv_storage: str = "auto",
        sessions: int = 1,
        on_event: Callable[[Event], None] | None = None,
    ) -> Generate:
        """Check everything, plan memory, warm up; the result is called with prompts.

        height, width [pixels], frames: default to what the generator was trained for. policy: a name or object; the
        default is "dsa" with a confidence head and "dense" without. window, sink: latent frames of context kept and,
        of those, first frames kept for good (autoregressive bundles; default: the whole clip, or the bundle's window
        for longer ones). steps, guidance_scale: many-step bundles only. guidance_scale_2: of the second of two experts
        (default: as the first). memory_limit: bytes or text such as "2GB".

        kv_storage: where an HSA run keeps K/V from step to step: "model" (on the device in the model's dtype), "fp8"
        (half of bf16; close to it, not bit for bit), "host" (in host memory, fetched one layer ahead; the same bits) or
        "auto": the first of these that fits the limit and what is free now; ``plan`` says which and why.

        sessions: clips that can be made side by side in shared passes (autoregressive bundles), each with its own K/V:
        by a list of prompts, or :meth:`Generate.serve`.

        Raises ShapeError, PolicyError, OptionError, MemoryLimitError, before anything is allocated.
        """
        from dsa_rt.settings import settle

        settings = settle(
            self, height, width, frames, policy, window, sink, steps, guidance_scale, memory_limit,
            kv_storage, guidance_scale_2, sessions,
        )  # fmt: skip
        started = time.perf_counter()
        generate = Generate(self, settings)
        generate.warm_up(on_event, started)
        return generate
