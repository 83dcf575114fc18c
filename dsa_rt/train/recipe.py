"""The demo's whole recipe, stage by stage: every stage resumes, and one that is done is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from dsa_rt.bundle import Schedule, Size
from dsa_rt.codec.conv import ConvCodec
from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.demo.grammar import MAX_WORDS, VOCABULARY
from dsa_rt.demo.world import SIZE
from dsa_rt.errors import OptionError
from dsa_rt.exporting import export
from dsa_rt.models.confidence import ConfidenceConfig
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import Calibration, fit_calibration
from dsa_rt.schedule import few_step_sigmas

TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
SHIFT = 3.0
FRAMES, SIDE, CHUNK = 81, SIZE, 3
GUIDANCE = 2.5
MATCHED_GUIDANCE = 3.0  # of the real score, as in Self-Forcing; with 2.0 motion freezes: the calm pace wins
MANY_STEPS = 40


@dataclass(frozen=True)
class Recipe:
    """Budgets in minutes, data in clips. ``SCALES`` has the named ones."""

    codec_minutes: float
    clips: int
    flow_minutes: float
    solutions: int
    ode_steps: int
    regression_minutes: float
    distillation_minutes: float
    head_minutes: float
    calibration_clips: int
    decoder_minutes: float = 15
    batch_tokens: int = 6720
    batch: int = 16


SCALES = {
    "quick": Recipe(0.5, 64, 0.5, 16, 8, 0.5, 0.5, 0.2, 32, decoder_minutes=0.2),
    "cpu": Recipe(20, 12000, 120, 480, 16, 6, 25, 8, 256),
    "gpu": Recipe(6, 60000, 10, 2048, 24, 3, 10, 2, 512, decoder_minutes=4, batch_tokens=43008, batch=64),
}


def generator_config(form: str) -> WanConfig:
    return WanConfig(
        dim=192, ffn_dim=512, heads=3, layers=6, in_channels=12, out_channels=12, text_dim=64, text_length=MAX_WORDS,
        form=form,
    )  # fmt: skip


def run(
    out: Path, scale: str, device: str = "cpu", upto: str | None = None, start: str | None = None, **changes: Any
) -> None:  # fmt: skip
    """Train everything under ``out`` and write ``out/bundles/streaming`` and ``out/bundles/many-step``.

    scale: a name of ``SCALES``; changes: single fields of the recipe. upto: stop after this stage ("codec", "decoder",
    "flow", "regression", "distillation", "head"). start: a many-step bundle whose codec is kept and whose generator and
    text encoder are trained on, in place of starting from nothing.
    """
    if scale not in SCALES:
        raise OptionError(f"scale {scale!r} is unknown; expected one of {', '.join(SCALES)}")
    recipe = replace(SCALES[scale], **{k: v for k, v in changes.items() if v is not None})
    from dsa_rt.runtime import load
    from dsa_rt.train.codec import load_codec, train_codec
    from dsa_rt.train.data import LatentClips, encode_clips
    from dsa_rt.train.distill import train_distillation
    from dsa_rt.train.flow import train_flow
    from dsa_rt.train.head import calibration_records, fit_head
    from dsa_rt.train.regress import train_regression

    start_from: tuple[WanModel, GrammarTextEncoder] | None = None
    if start is not None:
        before = load(start, dtype="fp32")
        own = isinstance(before.codec, ConvCodec) and isinstance(before.text_encoder, GrammarTextEncoder)
        if not own or before.model.config != generator_config("bidirectional"):
            raise OptionError(f"bundle {start!r} has a generator of other sizes or form; start from 'demo-many-step'")
        start_from = before.model, cast(GrammarTextEncoder, before.text_encoder)
        codec = cast(ConvCodec, before.codec)
    else:
        if not (out / "codec" / "model.safetensors").exists():
            train_codec(out / "codec", minutes=recipe.codec_minutes, device=device)
        if upto == "codec":
            return
        if not (out / "decoder" / "result.json").exists():  # latents stay as they are
            train_codec(out / "decoder", minutes=recipe.decoder_minutes, device=device, decoder_of=out / "codec")
        codec = load_codec(out / "decoder")
        if upto == "decoder":
            return
    config, text_config = generator_config("bidirectional"), GrammarTextConfig(len(VOCABULARY), MAX_WORDS, dim=64)
    frames = 1 + (FRAMES - 1) // codec.temporal_factor
    side = SIDE // codec.spatial_factor // config.patch[1]
    grid, sigmas = TokenGrid(side, side, config.patch), few_step_sigmas(TIMESTEPS, SHIFT)
    encode_clips(out / "clips", codec, config.patch, clips=recipe.clips, frames=FRAMES)
    clips = LatentClips(out / "clips")
    teacher, encoder = train_flow(
        out / "flow", clips, config, text_config, grid, minutes=recipe.flow_minutes, batch_tokens=recipe.batch_tokens,
        device=device, start=start_from,
    )  # fmt: skip
    (out / "bundles").mkdir(exist_ok=True)
    size = Size(SIDE, SIDE, FRAMES)
    notes = {"scale": scale, "start": start, "recipe": asdict(recipe), "torch": torch.__version__, "device": device}
    export(
        out / "bundles" / "many-step", name="dsa_rt demo, many-step", model=teacher, codec=codec, text_encoder=encoder,
        schedule=Schedule(SHIFT, MANY_STEPS), size=size, guidance=GUIDANCE, training=notes, overwrite=True,
    )  # fmt: skip
    if upto == "flow":
        return
    student = train_regression(
        out / "regression", teacher, encoder, clips, grid, sigmas, chunk=CHUNK, solutions=recipe.solutions,
        ode_steps=recipe.ode_steps, shift=SHIFT, guidance=GUIDANCE, minutes=recipe.regression_minutes,
        batch=recipe.batch, device=device,
    )  # fmt: skip
    if upto == "regression":
        return
    head_config = ConfidenceConfig(config.dim, config.heads, 128, (3, 5))
    student, head = train_distillation(
        out / "distillation", student, teacher, encoder, grid, sigmas, head_config, frames=frames, chunk=CHUNK,
        guidance=MATCHED_GUIDANCE, shift=SHIFT, minutes=recipe.distillation_minutes, batch=recipe.batch, device=device,
    )  # fmt: skip
    calibration = None
    if upto != "distillation":
        head = fit_head(
            out / "head", student, head, encoder, grid, sigmas, frames=frames, chunk=CHUNK,
            minutes=recipe.head_minutes, batch=2 * recipe.batch, device=device,
        )  # fmt: skip
        records = calibration_records(
            student, head, encoder, grid, sigmas, frames=frames, chunk=CHUNK, clips=recipe.calibration_clips,
            device=device,
        )  # fmt: skip
        calibration = _calibrate(out, records)
    export(
        out / "bundles" / "streaming", name="dsa_rt demo, streaming", model=student, codec=codec, text_encoder=encoder,
        head=head, schedule=Schedule(SHIFT, TIMESTEPS), size=size, chunk_frames=CHUNK, window=frames, sink=0,
        calibration=calibration, training=notes, overwrite=True,
    )  # fmt: skip


def _calibrate(out: Path, records: Any) -> Calibration:
    import json

    (out / "records.json").write_text(json.dumps(records.to_dict()))
    return fit_calibration(records)
