"""Image-to-video through load, compile and generate: against diffusers' pipelines, under HSA, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from published import pipeline
from torch import Tensor

from dsa_rt import reference
from dsa_rt.cli import main
from dsa_rt.convert import Choices, convert
from dsa_rt.errors import DsaRtError, OptionError, PromptError, ShapeError
from dsa_rt.images import read_image
from dsa_rt.media import Video
from dsa_rt.models.wan import WanModel
from dsa_rt.runtime import Runtime, load

HEIGHT, WIDTH, FRAMES, STEPS = 48, 80, 9, 4
PROMPT, OTHER = "a red ball bouncing on grass", " ".join(["a blue cat"] * 100)  # of 512 rows enough to matter
Bundles = Callable[[str], Runtime]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Runtimes of whole published pipelines with random weights, by kind; fp32, 48 x 80 pixels, 9 frames, 4 steps."""
    root, known = tmp_path_factory.mktemp("images"), {}

    def runtime(kind: str) -> Runtime:
        if kind not in known:
            pipeline(kind).save_pretrained(root / f"{kind}-source")
            choices = Choices(name=kind, steps=STEPS, guidance=3.0, height=HEIGHT, width=WIDTH, frames=FRAMES)
            convert(root / f"{kind}-source", root / kind, choices=choices)
            known[kind] = load(root / kind, dtype="fp32")
        return known[kind]

    return runtime


def height_of(kind: str) -> int:
    """TI2V's pixels come in steps of 32."""
    return 64 if kind == "ti2v" else HEIGHT


def width_of(kind: str) -> int:
    return 96 if kind == "ti2v" else WIDTH


def picture(kind: str = "i2v") -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height_of(kind), width_of(kind), 3), dtype=np.uint8)


def clip(runtime: Runtime, kind: str, *arguments: Any, **options: Any) -> Video:
    settings = {name: options.pop(name) for name in ("policy", "steps", "guidance_scale") if name in options}
    video = runtime.compile(height_of(kind), width_of(kind), **settings)(*arguments, **options)
    assert isinstance(video, Video)
    return video


def noise(runtime: Runtime, kind: str, seed: int) -> Tensor:
    grid = runtime.compile(height_of(kind), width_of(kind), policy="dense").settings.grid
    tokens = torch.arange(3 * grid.tokens)
    return grid.unpatchify(reference.philox_normal(torch.tensor([seed]), tokens, runtime.model.config.velocity_dim, 0))


@pytest.mark.parametrize("kind", ["i2v", "i2v-a14b", "ti2v"])
def test_against_the_pipeline(bundles: Bundles, kind: str) -> None:
    """The same image, noise, prompt and negative prompt through WanImageToVideoPipeline with Euler."""
    runtime, parts = bundles(kind), dict(pipeline(kind).components)
    parts["scheduler"] = scheduler = FlowMatchEulerDiscreteScheduler(shift=runtime.manifest.schedule.shift)
    levels, set_timesteps = [1 - step / STEPS for step in range(STEPS)], scheduler.set_timesteps
    scheduler.set_timesteps = lambda _, device: set_timesteps(device=device, sigmas=levels)  # shifted by the scheduler
    for name in ("image_encoder", "image_processor"):
        parts.setdefault(name, None)
    theirs = WanImageToVideoPipeline(**parts, boundary_ratio=runtime.manifest.boundary, expand_timesteps=kind == "ti2v")
    theirs.set_progress_bar_config(disable=True)
    start = noise(runtime, kind, 11)
    expected = theirs(
        image=Image.fromarray(picture(kind)), prompt=PROMPT, negative_prompt=OTHER, height=height_of(kind),
        width=width_of(kind), num_frames=FRAMES, num_inference_steps=STEPS, guidance_scale=3.0, latents=start,
        output_type="latent",
    ).frames[0]  # fmt: skip
    video = clip(runtime, kind, PROMPT, 11, image=picture(kind), negative_prompt=OTHER)
    assert 0.1 < expected.std() < 20 and (expected - start[0]).std() > 0.1 and video.latents is not None
    assert (video.latents - expected).abs().max() <= 1e-4
    for other in ({"image": 255 - picture(kind)}, {"negative_prompt": ""}):
        changed = clip(runtime, kind, PROMPT, 11, **({"image": picture(kind), "negative_prompt": OTHER} | other))
        assert changed.latents is not None and (changed.latents - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["i2v", "i2v-a14b", "ti2v"])
def test_hsa(bundles: Bundles, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of moving tokens; TI2V's condition tokens stay what they are, bit for bit, and are in full steps alone."""
    runtime, seen = bundles(kind), []
    forward = WanModel.forward

    def record(self: WanModel, rows: Tensor, active: Any, *rest: Any) -> Any:
        seen.append((self is runtime.model_2, active.tokens.tolist(), rows.shape[-1]))
        return forward(self, rows, active, *rest)

    image = picture(kind)
    policy = "hsa:groups=0.4@8+0.6@2,window=0.5"
    generate = runtime.compile(height_of(kind), width_of(kind), policy=policy)
    with monkeypatch.context() as patch, generate.workspace():  # taken: so the call makes another, and calls the model
        patch.setattr(WanModel, "forward", record)
        video = generate(PROMPT, 3, image=image)
    assert isinstance(video, Video) and video.latents is not None and video.stats is not None
    tokens = 3 * generate.settings.grid.tokens
    fixed = generate.settings.grid.tokens if kind == "ti2v" else 0
    plan = generate.settings.image_plan if fixed else generate.settings.token_plan
    assert plan is not None and plan.fixed == fixed and (plan.tokens, plan.steps) == (tokens, 8)
    assert video.stats.chunks[0].active_tokens == plan.counts and min(plan.counts) < tokens
    assert [len(active) for _, active, _ in seen] == [count for count in plan.counts for _ in range(2)]
    assert all(len(active) == tokens or min(active) >= fixed for _, active, _ in seen)
    assert {second for second, _, _ in seen} == ({False, True} if kind == "i2v-a14b" else {False})
    if fixed:
        pixels = torch.from_numpy(image).float() / 255 * 2 - 1
        first = runtime.codec.encode(pixels.permute(2, 0, 1)[None, :, None])
        assert torch.equal(video.latents[:, :1], first[0])
    assert torch.equal(video.latents, generate(PROMPT, 3, image=image).latents)
    dense = clip(runtime, kind, PROMPT, 3, image=image, policy="dense", steps=8)
    assert 0 < (video.latents - dense.latents).abs().max() < 10


def test_ti2v_without_an_image(bundles: Bundles) -> None:
    """Text-to-video with the same function: no token is a condition."""
    runtime = bundles("ti2v")
    generate = runtime.compile(64, 96, policy="hsa:groups=0.4@8+0.6@2,window=0.5")
    alone, given = generate(PROMPT), generate(PROMPT, image=picture("ti2v"))
    assert isinstance(alone, Video) and isinstance(given, Video) and alone.stats and given.stats
    plan = generate.settings.token_plan
    assert plan is not None and alone.stats.chunks[0].active_tokens == plan.counts
    assert alone.stats.chunks[0].active_tokens != given.stats.chunks[0].active_tokens
    assert "image_sha256" not in alone.stats.settings and len(given.stats.settings["image_sha256"]) == 64
    (chunk,) = generate.stream(PROMPT, image=picture("ti2v"))
    assert torch.equal(chunk.latents, given.latents)
    with pytest.raises(OptionError, match="one frame was asked for"):
        runtime.compile(64, 96, 1)(PROMPT, image=picture("ti2v"))


def test_lists(bundles: Bundles) -> None:
    generate = bundles("i2v-a14b").compile(steps=1)
    one, two = picture(), 255 - picture()
    alone = [generate(PROMPT, 1, image=one), generate(OTHER, 2, image=two), generate(OTHER, 2, image=one)]
    both, shared = generate([PROMPT, OTHER], 1, image=[one, two]), generate([PROMPT, OTHER], 1, image=one)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(both, alone[:2], strict=True))
    assert torch.equal(shared[1].latents, alone[2].latents)
    for prompt, image, message in (
        ([PROMPT], [one, two], "1 prompts came with 2 images"), (PROMPT, [one], "1 images came with one prompt"),
        ([PROMPT, OTHER], [one, None], "give the first frame"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            generate(prompt, image=image)


def test_image_and_bundle_must_fit(bundles: Bundles, many_step: Runtime, causal: Runtime) -> None:
    generate = bundles("i2v").compile(steps=1)
    with pytest.raises(OptionError, match=r"bundle 'i2v' makes video from an image and a prompt: .* of 80x48 pixels"):
        generate(PROMPT)
    for runtime in (many_step, causal):
        compiled = runtime.compile(policy="dense")
        for call in (compiled, compiled.stream, compiled.session):
            with pytest.raises(OptionError, match="bundle 'tiny' makes video from a prompt alone; leave it out"):
                call("a red square bouncing", image=np.zeros((48, 32, 3), np.uint8))


# What an image may be


def test_images_that_are_read(tmp_path: Path) -> None:
    """Arrays, tensors, PIL images and files: the same pixels; grey, palette, opaque alpha and EXIF as meant."""
    pixels = picture()
    expected = torch.from_numpy(pixels)
    pil = Image.fromarray(pixels)
    pil.save(tmp_path / "a.png")
    opaque = pil.copy()
    opaque.putalpha(255)
    turned = Image.fromarray(np.rot90(pixels, 1).copy())  # a quarter turn to the left; orientation 6 undoes it
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for image in (pixels, pixels[:, ::-1][:, ::-1], expected, pil, tmp_path / "a.png", str(tmp_path / "a.png"), opaque,
                  tmp_path / "turned.png"):  # fmt: skip
        read = read_image(image, HEIGHT, WIDTH)
        assert read.dtype == torch.uint8 and torch.equal(read, expected)
    grey = pil.convert("L")
    assert torch.equal(read_image(grey, HEIGHT, WIDTH), torch.from_numpy(np.array(grey))[..., None].expand(-1, -1, 3))
    palette = pil.quantize(16)
    assert torch.equal(read_image(palette, HEIGHT, WIDTH), torch.from_numpy(np.array(palette.convert("RGB"))))


def test_images_that_are_refused(tmp_path: Path) -> None:
    pixels = picture()
    pil = Image.fromarray(pixels)
    clear = pil.copy()
    clear.putalpha(254)
    (tmp_path / "text.png").write_text("no picture")
    cut = tmp_path / "cut.png"
    pil.save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    cases: list[tuple[type[DsaRtError], Any, str]] = [
        (ShapeError, pil.resize((40, 48)), r"is 40x48 pixels .* makes 80x48: resize .*fit\(image, \(80, 48\)\)"),
        (ShapeError, pixels[:, :40], "is 40x48 pixels"),
        (ShapeError, pixels.astype(np.float32), r"\[48, 80, 3\] float32; expected \[48, 80, 3\] uint8"),
        (ShapeError, torch.rand(3, 48, 80), r"\[3, 48, 80\] torch.float32; expected \[48, 80, 3\] uint8"),
        (ShapeError, torch.zeros(3, 48, 80, dtype=torch.uint8), r"\[3, 48, 80\] torch.uint8; expected"),
        (ShapeError, pixels[..., 0], r"\[48, 80\] uint8; expected"),
        (OptionError, clear, "has transparent pixels; put it on a background"),
        (OptionError, pil.convert("CMYK"), "has mode CMYK; save it as RGB"),
        (OptionError, Image.fromarray(pixels[..., 0].astype(np.uint16)), "has mode I;16"),
        (OptionError, 3, "image is of type int; expected a PIL image"),
        (OptionError, tmp_path / "none.png", "none.png' cannot be read .*No such file"),
        (OptionError, tmp_path / "text.png", "text.png' cannot be read .*cannot identify"),
        (OptionError, cut, "cut.png' cannot be read"),
    ]
    for error, image, message in cases:
        with pytest.raises(error, match=message) as caught:
            read_image(image, HEIGHT, WIDTH)
        assert "\n" not in str(caught.value)
    pil.resize((40, 48)).save(tmp_path / "small.png")
    with pytest.raises(ShapeError, match="small.png' is 40x48 pixels"):
        read_image(tmp_path / "small.png", HEIGHT, WIDTH)


# Prompts, and the command line


def test_negative_prompt_and_empty_prompt(many_step: Runtime, causal: Runtime) -> None:
    prompt, generate = "a red square bouncing", many_step.compile()
    plain = generate(prompt, negative_prompt="")
    away = generate(prompt, negative_prompt="a blue circle at rest")
    assert torch.equal(plain.latents, generate(prompt).latents) and not torch.equal(plain.latents, away.latents)
    assert away.stats.settings["negative_prompt"] == "a blue circle at rest"
    with pytest.raises(PromptError, match="negative_prompt is None"):
        generate(prompt, negative_prompt=None)
    for compiled in (many_step.compile(guidance_scale=1.0), causal.compile(policy="dense")):
        with pytest.raises(OptionError, match="no guidance to lead away from it"):
            compiled(prompt, negative_prompt="a blue circle at rest")
        for empty in ("", " \n"):
            for call in (compiled, compiled.stream, compiled.session):
                with pytest.raises(PromptError, match="the prompt is empty; say what the video shows"):
                    call(empty)
        with pytest.raises(PromptError, match="empty"):
            compiled([prompt, ""])


def test_command_line(bundles: Bundles, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(bundles("i2v").bundle.path)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    asked = ["generate", PROMPT, "--bundle", path, "--dtype", "fp32", "--steps", "1", "--seed", "2", "--json"]
    assert main([*asked, "--image", str(tmp_path / "a.png"), "--negative-prompt", OTHER]) == 0
    stats = json.loads(capfd.readouterr().out)["stats"]
    video = bundles("i2v").compile(steps=1)(PROMPT, 2, image=picture(), negative_prompt=OTHER)
    assert isinstance(video, Video) and video.stats is not None
    assert stats["frames_sha256"] == video.stats.frames_sha256 and stats["settings"] == video.stats.settings
    for arguments, words in (([], "give the first frame"), (["--image", "gone.png"], "gone.png' cannot be read")):
        assert main([*asked, *arguments]) == 2
        assert words in capfd.readouterr().err
