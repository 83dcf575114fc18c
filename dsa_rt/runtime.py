"""Loading a bundle and compiling it into a ``generate`` function."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsa_rt.bundle import Bundle, Manifest, describe, open_bundle
from dsa_rt.codec.conv import ConvCodec, ConvCodecConfig
from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.errors import BundleError, OptionError
from dsa_rt.generate import Generate
from dsa_rt.memory import free_memory
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.wan import WanConfig, WanModel
from dsa_rt.policy import Policy
from dsa_rt.progress import Event
from dsa_rt.schedule import TRAIN_TIMESTEPS

DEMOS = {"demo": "streaming", "demo-many-step": "many-step"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_bundle(name: str | os.PathLike[str]) -> Path:
    """The folder of a bundle: "demo" and "demo-many-step" come with the package, anything else is a path."""
    if isinstance(name, str) and name in DEMOS:
        return Path(__file__).parent / "demo" / "bundles" / DEMOS[name]
    return Path(name)


def load(
    bundle: str | os.PathLike[str] = "demo", device: str | torch.device = "cpu", dtype: str = "auto",
    verify_hashes: bool = True,
) -> Runtime:  # fmt: skip
    """Open a bundle and put its weights on a device.

    bundle: a bundle's folder, or "demo" (few-step, autoregressive) or "demo-many-step". device: "cpu", "cuda",
    "cuda:1" … dtype: "fp32", "bf16", "fp16", or "auto": bf16 where the device multiplies it natively, else fp32.
    Raises BundleError (before memory is taken), OptionError.
    """
    opened = open_bundle(find_bundle(bundle), verify_hashes)
    place, number = _device(device), _dtype(dtype, device)
    need = sum(e.numel * number.itemsize for part in opened.tensors.values() for e in part.values())
    free = free_memory(place)
    if free is not None and need > free:
        from dsa_rt.errors import MemoryLimitError

        raise MemoryLimitError(
            f"the weights of '{opened.path}' need {need / 1e6:.1f} MB as {number}, but {free / 1e6:.1f} MB are free on "
            f"{place}; a smaller dtype or bundle needs less"
        )
    architecture = opened.manifest.architecture
    if architecture["kind"] != "wan":
        raise BundleError(f"bundle '{opened.path}': architecture {architecture['kind']!r} is unknown; expected 'wan'")
    with torch.device("meta"):
        model = WanModel(opened.config("architecture", WanConfig))
        head = None
        if opened.manifest.confidence_head is not None:
            head = ConfidenceHead(opened.config("confidence_head", ConfidenceConfig))
            if head.config.dim != model.config.dim or head.config.taps[-1] >= model.config.layers:
                raise BundleError(
                    f"bundle '{opened.path}': confidence_head taps {head.config.taps} of width {head.config.dim} do "
                    f"not fit a generator of {model.config.layers} blocks of width {model.config.dim}"
                )
    codec = ConvCodec(opened.config("codec", _kind(opened, "codec", ConvCodec.kind, ConvCodecConfig)))
    text = GrammarTextEncoder(
        opened.config("text_encoder", _kind(opened, "text_encoder", GrammarTextEncoder.kind, GrammarTextConfig))
    )
    _check_fit(opened, model.config, codec, text.config)
    parts: list[tuple[str, nn.Module | None, torch.dtype]] = [
        ("generator", model, number), ("confidence_head", head, number), ("codec", codec, number),
        ("text_encoder", text, torch.float32),
    ]  # fmt: skip
    for component, module, _ in parts:
        if module is not None:
            opened.expect(component, {name: tuple(t.shape) for name, t in module.state_dict().items()})
    for component, module, kind in parts:
        if module is not None:
            module.load_state_dict(opened.load(component, place, kind), assign=True)
            module.requires_grad_(False).eval()
    codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it alone
    return Runtime(opened, model, head, codec, text, place, number)


def _check_fit(bundle: Bundle, model: WanConfig, codec: ConvCodec, text: GrammarTextConfig) -> None:
    """:class:`BundleError` where parts of a bundle have sizes that do not go together."""
    latent = bundle.manifest.latent
    pairs = [
        ("generator in_channels", model.in_channels, "codec channels", codec.latent_channels),
        ("generator out_channels", model.out_channels, "codec channels", codec.latent_channels),
        ("latent channels", latent.channels, "codec channels", codec.latent_channels),
        ("latent spatial", latent.spatial, "codec spatial factor", codec.spatial_factor),
        ("latent temporal", latent.temporal, "codec temporal factor", codec.temporal_factor),
        ("generator text_dim", model.text_dim, "text_encoder dim", text.dim),
        ("generator text_length", model.text_length, "text_encoder length", text.length),
    ]
    if latent.mean is not None or bundle.manifest.schedule.train_timesteps != TRAIN_TIMESTEPS:
        raise BundleError(
            f"bundle '{bundle.path}': this version reads latents that the codec normalises itself (mean, std null) "
            f"and train_timesteps {TRAIN_TIMESTEPS}; export it that way"
        )
    for name, value, other, expected in pairs:
        if value != expected:
            raise BundleError(
                f"bundle '{bundle.path}': {name} is {value} but {other} is {expected}; its parts do not belong together"
            )


def _kind(bundle: Bundle, part: str, known: str, config: type[Any]) -> type[Any]:
    kind = getattr(bundle.manifest, part).kind
    if kind != known:
        raise BundleError(f"bundle '{bundle.path}': {part} kind {kind!r} is unknown; this version reads {known!r}")
    return config


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


def _dtype(dtype: str, device: str | torch.device) -> torch.dtype:
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
    """Weights on a device. Nothing in it changes; any number of compiled functions and threads may share it."""

    bundle: Bundle
    model: WanModel
    head: ConfidenceHead | None
    codec: ConvCodec
    text_encoder: GrammarTextEncoder
    device: torch.device
    dtype: torch.dtype

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

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
        memory_limit: int | str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Generate:
        """Check everything, plan memory, warm up; the result is called with prompts.

        height, width [pixels], frames: default to what the generator was trained for. policy: a name or object; the
        default is "dsa" with a confidence head and "dense" without. window, sink: latent frames of context kept and,
        of those, first frames kept for good (autoregressive bundles; default: the whole clip, or the bundle's window
        for longer ones). steps, guidance_scale: many-step bundles only. memory_limit: bytes or text such as "2GB".
        Raises ShapeError, PolicyError, OptionError, MemoryLimitError, before anything is allocated.
        """
        from dsa_rt.settings import settle

        settings = settle(
            self, height, width, frames, policy, window, sink, steps, guidance_scale, memory_limit
        )
        generate = Generate(self, settings)
        started = time.perf_counter()
        generate.warm_up(on_event, started)
        return generate
