"""A published checkpoint into a bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsa_rt.bundle import Bundle, Latent, Manifest, Schedule, Size
from dsa_rt.bundle import Part as Section
from dsa_rt.convert import parts
from dsa_rt.convert.finding import Found, find
from dsa_rt.convert.sources import TORCH_SUFFIXES, open_safetensors, open_torch, torch_source
from dsa_rt.convert.writing import Progress, write_parts
from dsa_rt.errors import BundleError, OptionError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW_STEPS = (1000.0, 750.0, 500.0, 250.0)  # Self-Forcing's, before the shift
STEPS = 50
TAPS = {30: (13, 21, 29)}  # blocks of the generator -> those that a confidence head reads (arXiv 2606.04432)


@dataclass(frozen=True)
class Choices:
    """What a checkpoint's files do not say, or what is wanted otherwise; None takes what is usual for its kind.

    name: of the bundle. form: "causal" or "bidirectional", how the generator was trained. steps: Euler steps of a
    many-step generator, or falling timesteps of a few-step one. shift: of the schedule. guidance: default scale, 1 =
    none. height, width [pixels], frames, fps: what it was trained for. chunk_frames, window, sink [latent frames]: of a
    causal generator. boundary: where the second expert takes over, a part of the timesteps. taps: blocks that the
    confidence head reads.
    """

    name: str | None = None
    form: str | None = None
    steps: int | tuple[float, ...] | None = None
    shift: float | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None
    chunk_frames: int | None = None
    window: int | None = None
    sink: int | None = None
    boundary: float | None = None
    taps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.form not in (None, "causal", "bidirectional"):
            raise OptionError(f'form is {self.form!r}; expected "causal" or "bidirectional"')


def convert(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    components: Sequence[str | os.PathLike[str]] = (),
    decoder: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    choices: Choices = Choices(),
    shard_bytes: int = 4 << 30,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Writes the bundle ``dest`` from a published Wan checkpoint, one tensor in memory at a time.

    source: a folder of diffusers, the original Wan layout (folder or safetensors file), or a torch file such as
    Self-Forcing's. components: folders with the text encoder, tokenizer, video codec and image encoder that ``source``
    lacks (a diffusers pipeline, or the folder of one of them). decoder: a tiny decoder in the TAEHV layout (safetensors
    or torch file) to take in place of the video codec. dtype: "fp32", "bf16" or "fp16", of all weights; None keeps what
    each tensor has, see :func:`dsa_rt.convert.parts.with_dtype`. weights: "ema" or "raw" (torch files with both).
    shard_bytes: size of files. progress: called with (bytes, bytes in all).

    An export that is interrupted leaves ``dest``.partial, and the same call goes on from there. Raises BundleError for
    a checkpoint that is not whole or not known, OptionError, OutputError; nothing is half-written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected {', '.join(map(repr, DTYPES))}, or none to keep the file's")
    if weights not in (None, "ema", "raw"):
        raise OptionError(f"weights is {weights!r}; expected 'ema' or 'raw'")
    if shard_bytes < 1:
        raise OptionError(f"shard size is {shard_bytes}; expected at least 1 byte")
    found = find(Path(source), weights, choices.form)
    folders = (*found.folders, *map(Path, components))
    for folder in folders:
        if not folder.is_dir():
            raise BundleError(f"'{folder}' is not a folder; --components names those with encoders and a video codec")
    kept = {
        "codec": _video_codec(folders, decoder, found),
        "text_encoder": _text_encoder(folders, found),
        "image_encoder": _image_encoder(folders) if found.config.image_dim is not None else None,
    }
    written: dict[str, parts.Part] = dict(zip(("generator", "generator_2"), found.generators, strict=False))
    head = None
    if found.head is not None:
        taps = choices.taps if choices.taps is not None else TAPS.get(found.config.layers, ())
        written["confidence_head"], head = parts.confidence_head(*found.head, found.config, taps)
    elif choices.taps is not None:
        raise OptionError(f"--taps was given, but '{source}' has no confidence head; leave it out")
    written |= {name: component.part for name, component in kept.items() if component is not None}
    number = None if dtype is None else DTYPES[dtype]
    written = {name: parts.with_dtype(part, number, f"the {name} of '{source}'") for name, part in written.items()}
    manifest = _manifest(found, choices, Path(source), kept, None if head is None else head.to_dict())
    assets = {name: file for one in kept.values() if one is not None for name, file in one.assets.items()}
    return write_parts(dest, manifest, written, assets, shard_bytes, overwrite, progress)


def _manifest(
    found: Found, choices: Choices, source: Path, kept: dict[str, parts.Component | None], head: dict[str, Any] | None
) -> Manifest:
    causal, first_frame = found.config.form == "causal", found.first_frame
    if not causal:
        given = [name for name in ("chunk_frames", "window", "sink") if getattr(choices, name) is not None]
        if given:
            raise OptionError(
                f"{', '.join(given)}: only causal generators have that; leave it out, or say that this is one with "
                "form='causal' (--form causal)"
            )
    if (choices.boundary is not None) and len(found.generators) == 1:
        raise OptionError("a boundary belongs to two experts, and this checkpoint has one generator; leave it out")
    steps: int | tuple[float, ...] = FEW_STEPS if causal else STEPS
    if choices.steps is not None:
        steps = choices.steps
        if isinstance(steps, int) == causal:
            needed = "a list of timesteps (--timesteps)" if causal else "a number of steps (--steps)"
            raise OptionError(f"steps is {steps!r}, but a {found.config.form} generator needs {needed}")
    height, width, frames, fps = (704, 1280, 121, 24.0) if first_frame else (480, 832, 81, 16.0)
    latent = _latent(found, kept["codec"])
    notes = {"converted_from": source.resolve().name, "weights": found.weights}
    return Manifest(
        name=choices.name if choices.name is not None else _name(source.resolve()),
        architecture={"kind": "wan", **found.config.to_dict()},
        schedule=Schedule(_first(choices.shift, found.shift, 5.0), steps),
        latent=latent,
        size=Size(
            _first(choices.height, height), _first(choices.width, width), _first(choices.frames, frames)
        ),
        codec=_section(kept["codec"]),
        text_encoder=_section(kept["text_encoder"]),
        image_encoder=_section(kept["image_encoder"]),
        fps=_first(choices.fps, fps),
        chunk_frames=_first(choices.chunk_frames, 3) if causal else None,
        window=choices.window,
        sink=choices.sink,
        guidance=_first(choices.guidance, 1.0 if causal else 5.0),
        confidence_head=head,
        training={key: value for key, value in notes.items() if value is not None},
        boundary=_first(choices.boundary, found.boundary) if len(found.generators) == 2 else None,
        image_conditioning=found.image_conditioning,
    )


def _name(source: Path) -> str:
    """Of a folder all of it: what follows the dot in "Wan2.1-T2V-1.3B-Diffusers" is no suffix."""
    return source.name if source.is_dir() else source.stem


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _section(component: parts.Component | None) -> Section | None:
    return None if component is None else Section(component.kind, component.config)


def _latent(found: Found, codec: parts.Component | None) -> Latent:
    """The latents that the generator makes, which must be the codec's."""
    channels = found.config.out_channels
    if codec is None:
        return Latent(channels, 16 if found.first_frame else 8, 4)
    from dsa_rt.codec.tiny import TinyCodec

    if codec.kind == TinyCodec.kind:
        theirs, spatial, temporal = codec.config["z"], 8 * codec.config["patch"], 4
    else:
        sizes = codec.config
        theirs, spatial, temporal = sizes["z_dim"], sizes["scale_factor_spatial"], sizes["scale_factor_temporal"]
    if theirs != channels:
        raise BundleError(
            f"the video codec has {theirs} latent channels, but the generator makes {channels}; they belong to "
            "different models"
        )
    return Latent(channels, spatial, temporal)


# Encoders and codecs ------------------------------------------------------------------------------------------------


def _video_codec(
    folders: Sequence[Path], decoder: str | os.PathLike[str] | None, found: Found
) -> parts.Component | None:
    if decoder is not None:
        if found.image_conditioning != "none":
            raise OptionError(
                "a tiny decoder cannot encode the first frame of image-to-video; export the video codec, and name the "
                "tiny decoder when the bundle is loaded: load(..., decoder=FILE)"
            )
        path = Path(decoder)
        if path.suffix not in TORCH_SUFFIXES:
            return parts.tiny_decoder(open_safetensors(path))
        content = open_torch(path)
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise BundleError(f"'{path}' is not a dict of tensors; expected a tiny decoder in the TAEHV layout")
        return parts.tiny_decoder(torch_source(content, path))
    folder = _folder(folders, "vae", "_class_name", "AutoencoderKLWan")
    return None if folder is None else parts.video_codec(folder)


def _text_encoder(folders: Sequence[Path], found: Found) -> parts.Component | None:
    folder = _folder(folders, "text_encoder", "model_type", "umt5")
    if folder is None:
        return None
    places = [place / name for place in folders for name in ("tokenizer", ".", "google/umt5-xxl")]
    tokenizer = next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)
    if tokenizer is None:
        raise BundleError(
            f"there is a text encoder in '{folder}', but no tokenizer.json in {', '.join(map(str, folders))} or in "
            "tokenizer/ there; transformers writes one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    component = parts.text_encoder(folder, tokenizer, found.config.text_length)
    if component.config["d_model"] != found.config.text_dim:
        raise BundleError(
            f"the text encoder in '{folder}' makes rows of {component.config['d_model']}, but the generator reads rows "
            f"of {found.config.text_dim}; they belong to different models"
        )
    return component


def _image_encoder(folders: Sequence[Path]) -> parts.Component | None:
    folder = _folder(folders, "image_encoder", "model_type", "clip_vision_model")
    if folder is None:
        return None
    places = [folder, *(place / "image_processor" for place in folders)]
    files = [place / "preprocessor_config.json" for place in places]
    processor = next((file for file in files if file.is_file()), None)
    if processor is None:
        raise BundleError(
            f"there is an image encoder in '{folder}', but no preprocessor_config.json there or in image_processor/; "
            "download it too"
        )
    return parts.image_encoder(folder, processor)


def _folder(folders: Sequence[Path], name: str, key: str, value: str) -> Path | None:
    """Where a component lies: in a folder of its name, or in one whose config.json says that it is one."""
    for folder in folders:
        if (folder / name / "config.json").is_file():
            return folder / name
        file = folder / "config.json"
        if file.is_file() and parts.read_json(file).get(key) == value:
            return folder
    return None
