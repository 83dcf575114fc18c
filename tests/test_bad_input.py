"""Everything a user of the Python face can get wrong: one clear error of the right class that names the value."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_bundle

import dsa_rt
from dsa_rt.errors import (
    BundleError,
    DsaRtError,
    MemoryLimitError,
    OptionError,
    PolicyError,
    PromptError,
    ShapeError,
)
from dsa_rt.memory import MemoryPlan
from dsa_rt.policy import DSA, Fixed
from dsa_rt.runtime import Runtime, load
from dsa_rt.settings import _latent_frames

PROMPT = "a red square bouncing"


def refused(error: type[DsaRtError], message: str, call: Callable[[], object]) -> None:
    """Exactly that class, its message holding every one of the parts, on one line that a person would read."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    for part in message.split(" … "):
        assert part in text, f"{part!r} is not in {text!r}"
    assert "\n" not in text and 20 < len(text) < 600


# Policies


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("dsa-papre", "unknown policy 'dsa-papre' … did you mean 'dsa-paper'? … dense, fixed-N"),
        ("", "unknown policy ''"),
        ("fixed", "unknown policy 'fixed'"),
        ("fixed-0", "0"),
        ("fixed-5", "policy fixed-5 asks for 5 passes, but 4 are scheduled"),
        ("fixed-2-then-9", "asks for 9 passes, but 4 are scheduled"),
        ("dsa:speed=3", "option 'speed=3' is not known"),
        ("dsa:fps=fast", "fps is 'fast'; expected a number"),
        ("dsa:calls=20,fps=9", "both stated"),
        ("dense:fps=9", "dense takes no options"),
        ("dsa-calibrated", "needs a calibration and this bundle has none"),
        ("dsa:passes=2", "needs a calibration and this bundle has none"),
        (7, "policy is 7; expected a name"),
        (Fixed(passes=6), "fixed-6 asks for 6 passes, but 4 are scheduled"),
        (DSA("calibrated"), "dsa-calibrated"),
    ],
)
def test_policies(causal: Runtime, policy: Any, message: str) -> None:
    refused(PolicyError, message, lambda: causal.compile(policy=policy))


def test_policies_that_do_not_fit_the_bundle(headless: Runtime, many_step: Runtime) -> None:
    for policy in ("dsa", "dsa-paper"):
        refused(PolicyError, f"policy {policy} needs a confidence head", lambda p=policy: headless.compile(policy=p))
    for policy in ("dsa", "fixed-2"):
        message = f"policy {policy} decides passes per chunk … use policy='dense'"
        refused(PolicyError, message, lambda p=policy: many_step.compile(policy=p))


# Sizes


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ({"height": 50}, ShapeError, "height 50 is not a multiple of 16 … 48 or 64 would be"),
        ({"width": 33}, ShapeError, "width 33 is not a multiple of 16 … 32 or 48 would be"),
        ({"height": 7}, ShapeError, "height 7 is not a multiple of 16 … 16 would be"),
        ({"height": 0}, OptionError, "height is 0; expected a whole number of 1 or more"),
        ({"width": -16}, OptionError, "width is -16"),
        ({"height": 48.0}, OptionError, "height is 48.0"),
        ({"width": "32"}, OptionError, "width is '32'"),
        ({"width": True}, OptionError, "width is True"),
        ({"frames": 0}, OptionError, "frames is 0"),
        ({"frames": 30}, ShapeError, "30 frames cannot be made in whole chunks … 21 or 33 would do"),
        ({"frames": 32}, ShapeError, "32 frames … 21 or 33 would do"),
        ({"frames": 13}, ShapeError, "13 frames … 9 or 21 would do"),
        ({"frames": 4}, ShapeError, "4 frames … 9 would do"),
        ({"frames": 1}, ShapeError, "1 frames … 9 would do"),
    ],
)
def test_sizes(causal: Runtime, size: dict[str, Any], error: type[DsaRtError], message: str) -> None:
    refused(error, message, lambda: causal.compile(policy="dense", **size))


@pytest.mark.parametrize("frames", range(1, 61))
def test_the_lengths_a_message_names_do(causal: Runtime, frames: int) -> None:
    """Every length either compiles or is refused with lengths that compile, the nearest on each side."""
    good = [9, 21, 33, 45, 57, 69]
    if frames in good:
        assert _latent_frames(frames, 4, 3) == (frames + 3) // 4
        return
    with pytest.raises(ShapeError) as caught:
        _latent_frames(frames, 4, 3)
    named = [int(n) for n in re.findall(r"\d+", str(caught.value).rpartition(";")[2])]
    assert named == [g for g in good if g < frames][-1:] + [g for g in good if g > frames][:1]


def test_sizes_of_a_many_step_bundle(many_step: Runtime) -> None:
    refused(ShapeError, "34 frames … 33 or 37 would do", lambda: many_step.compile(frames=34))
    assert many_step.compile(frames=1).settings.latent_frames == 1


# Window and sink; options of the other kind of bundle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2}, "window 2 with sink 0 does not hold a chunk of 3 … window >= sink + 3"),
        ({"window": 5, "sink": 3}, "window 5 with sink 3 … window >= sink + 3"),
        ({"window": 6, "sink": -1}, "sink -1"),
        ({"window": 0}, "window is 0"),
        ({"window": 6.0}, "window is 6.0"),
        ({"sink": 7}, "window 9 with sink 7"),
        ({"sink": 1.5}, "sink 1.5"),
        ({"steps": 4}, "steps=4 was given, but this few-step generator"),
        ({"guidance_scale": 3.0}, "guidance_scale=3.0 was given, but this few-step generator"),
        ({"guidance_scale_2": 3.0}, "guidance_scale_2=3.0 was given, but this few-step generator"),
    ],
)
def test_options_of_a_few_step_bundle(causal: Runtime, options: dict[str, Any], message: str) -> None:
    refused(OptionError, message, lambda: causal.compile(policy="dense", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 9}, "window=9 was given, but this generator sees the whole clip at once"),
        ({"sink": 0}, "sink=0 was given"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": 1e9}, "guidance_scale is 1000000000.0; expected a number from 0 to 100"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"guidance_scale_2": 3.0}, "is for the second of two experts, but bundle 'tiny' has one generator"),
    ],
)
def test_options_of_a_many_step_bundle(many_step: Runtime, options: dict[str, Any], message: str) -> None:
    refused(OptionError, message, lambda: many_step.compile(**options))


# Prompts and seeds


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red dog bouncing", "expected a shape but found 'dog' … circle, square, triangle"),
        ("a read square bouncing", "found 'read', did you mean 'red'?"),
        ("a red square", "expected a motion but the prompt ends"),
        ("a red square bouncing " + "and a blue circle at rest " * 9, "words; the demo reads at most 20"),
        ("a red square bouncing, a red circle at rest", "two red objects"),
        (None, "prompt is None"),
        (b"a red square bouncing", "prompt is b'a red square bouncing'"),
        (3, "prompt is 3"),
    ],
)
def test_prompts(causal: Runtime, prompt: Any, message: str) -> None:
    generate = causal.compile(policy="fixed-1")
    calls: list[Callable[[], object]] = [
        lambda: generate(prompt), lambda: generate([PROMPT, prompt]), lambda: generate.stream(prompt),
        lambda: generate.session(prompt), lambda: generate.session(PROMPT).set_prompt(prompt),
    ]  # fmt: skip
    for call in calls:  # a stream says so when it is asked for, not at its first chunk
        refused(PromptError, message, call)


@pytest.mark.parametrize(
    ("prompt", "seed", "message"),
    [
        (PROMPT, 1.0, "seed is 1.0"), (PROMPT, "1", "seed is '1'"), (PROMPT, None, "seed is None"),
        (PROMPT, True, "seed is True"), (PROMPT, [1], "seed is [1]"), (PROMPT, 2**63, f"seed is {2**63}"),
        ([PROMPT], None, "seed is None"), ([PROMPT], 1.5, "seed is 1.5"), ([PROMPT], [1.5], "seed is 1.5"),
        ([PROMPT, PROMPT], [1], "2 prompts came with 1 seeds"), ([PROMPT], [1, 2], "1 prompts came with 2 seeds"),
        ([PROMPT, PROMPT], 2**63 - 1, f"seed is {2**63}"), ([PROMPT], "7", "seed is '7'"),
    ],
)  # fmt: skip
def test_seeds(causal: Runtime, prompt: Any, seed: Any, message: str) -> None:
    generate = causal.compile(policy="fixed-1")
    refused(OptionError, message, lambda: generate(prompt, seed))
    if isinstance(prompt, str):
        refused(OptionError, message, lambda: generate.session(prompt, seed))


# Device, dtype, memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu9"}, "device 'tpu9' is unknown; expected 'cpu', 'cuda'"),
        ({"device": "mps"}, "device 'mps' is not supported"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"device": None}, "device None is unknown"),
        ({"dtype": "fp64"}, "dtype 'fp64' is unknown; expected 'auto', 'fp32', 'bf16', 'fp16'"),
        ({"dtype": torch.bfloat16}, "dtype torch.bfloat16 is unknown"),
        ({"dtype": None}, "dtype None is unknown"),
    ],
)
def test_device_and_dtype(causal_bundle: Path, options: dict[str, Any], message: str) -> None:
    refused(OptionError, message, lambda: load(causal_bundle, **options))


@pytest.mark.parametrize("limit", ["lots", "2 XB", "-1GB", -5, 0, "0", True, "1e9", "GB"])
def test_memory_limits_that_are_none(causal: Runtime, limit: Any) -> None:
    refused(OptionError, f"memory limit {limit!r} is not a size", lambda: causal.compile(memory_limit=limit))


def test_memory_limit_too_small(causal: Runtime) -> None:
    """How much is needed, and which setting lowers the largest part: doing so helps."""
    plan = causal.compile(policy="dense").plan
    needed = f"this needs {plan.total / 1e6:.1f} MB, but the memory limit is"
    refused(MemoryLimitError, needed, lambda: causal.compile(policy="dense", memory_limit=plan.total - 1))
    assert causal.compile(policy="dense", memory_limit=plan.total).plan == plan
    for options, advice in (
        ({"frames": 4809}, "output with 22.6 MB: fewer frames, or stream"),
        ({"height": 960, "width": 960}, "decode with .*: a smaller height or width"),
        ({"height": 16, "width": 16}, "weights with .*: dtype='bf16' or a smaller bundle"),
    ):
        with pytest.raises(MemoryLimitError, match=rf"limit is 0\.3 MB\. The largest part is {advice}"):
            causal.compile(policy="dense", memory_limit="300 kB", **options)


@pytest.mark.parametrize(
    ("largest", "advice"),
    [("weights", "dtype"), ("kv_cache", "window"), ("activations", "height"), ("decode", "height"),
     ("output", "frames")],
)  # fmt: skip
def test_the_largest_part_is_named(largest: str, advice: str) -> None:
    sizes = dict.fromkeys(("weights", "kv_cache", "activations", "decode", "output"), 1_000_000)
    plan = MemoryPlan(**(sizes | {largest: 7_000_000}))
    assert plan.total == 11_000_000
    message = f"needs 11.0 MB … limit is 10.0 MB … largest part is {largest} with 7.0 MB: … {advice} … lowers it"
    refused(MemoryLimitError, message, lambda: plan.check(10_000_000, torch.device("cpu")))
    plan.check(11_000_000, torch.device("cpu"))


def test_more_memory_than_there_is(causal: Runtime, monkeypatch: pytest.MonkeyPatch, causal_bundle: Path) -> None:
    monkeypatch.setattr("dsa_rt.memory.free_memory", lambda _: 500_000)
    refused(MemoryLimitError, "the free memory of cpu is 0.5 MB", lambda: causal.compile(policy="dense"))
    monkeypatch.setattr("dsa_rt.runtime.free_memory", lambda _: 1000)
    refused(MemoryLimitError, f"{causal_bundle} … 0.0 MB are free on cpu", lambda: load(causal_bundle))


def test_a_size_nobody_has_memory_for(causal: Runtime) -> None:
    """Refused by the plan, before anything is allocated."""
    side = 16 * 10**6
    refused(MemoryLimitError, "free memory", lambda: causal.compile(side, side, policy="dense"))


# Bundles (tests/bundle has every damage; here: that load says so, and what only it can see)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", "causal")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def rewrite(bundle: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Other tensors in a file, and a manifest that has its hash: only the models can tell."""
    tensors = load_file(bundle / file)
    change(tensors)
    save_file(tensors, bundle / file)
    data = (bundle / file).read_bytes()

    def update(manifest: dict[str, Any]) -> None:
        entry = next(e for e in manifest["files"] if e["path"] == file)
        entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    edit(bundle, update)


def test_no_bundle(tmp_path: Path) -> None:
    refused(BundleError, f"{tmp_path / 'nothing'}", lambda: dsa_rt.load(tmp_path / "nothing"))
    refused(BundleError, "demo-many-steps", lambda: dsa_rt.load("demo-many-steps"))


def test_truncated_and_altered(bundle: Path) -> None:
    file = bundle / "generator.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    refused(BundleError, f"{bundle} … generator.safetensors", lambda: load(bundle))
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # one bit, which only the hash can tell
    refused(BundleError, f"{bundle} … generator.safetensors", lambda: load(bundle))
    assert load(bundle, verify_hashes=False).dtype  # and which the user may choose to trust


NAME = "blocks.1.ffn.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), NAME),
        (lambda t: t.update({"blocks.2.ffn.0.weight": t[NAME].clone()}), "blocks.2.ffn.0.weight"),
        (lambda t: t.update({NAME: t[NAME][:, :-1].contiguous()}), f"{NAME} … (96, 47), expected (96, 48)"),
        (lambda t: t.update({NAME: t[NAME].flatten()}), NAME),
        (lambda t: t[NAME].view(-1)[77].fill_(torch.nan), NAME),
        (lambda t: t[NAME].view(-1)[3].fill_(torch.inf), NAME),
    ],
    ids=["missing", "surplus", "mis-shaped", "flat", "nan", "infinite"],
)
def test_tensors(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(bundle, "generator.safetensors", change)
    refused(BundleError, f"{bundle} … {message}", lambda: load(bundle))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=9), "format_version 9"),
        (lambda m: m["architecture"].update(kind="unet"), "architecture 'unet' is unknown"),
        (lambda m: m["architecture"].update(dim=64), ""),
        (lambda m: m["architecture"].update(depth=3), "depth"),
        (lambda m: m["architecture"].pop("heads"), "heads"),
        (lambda m: m["architecture"].update(heads=5), "48 does not split into 5 heads"),
        (lambda m: m["architecture"].update(layers="2"), "layers"),
        (lambda m: m["architecture"].update(in_channels=5), "in_channels is 5"),
        (lambda m: m["codec"].update(kind="vae"), "codec kind 'vae' is unknown"),
        (lambda m: m["text_encoder"].update(kind="t5"), "text_encoder kind 't5' is unknown"),
        (lambda m: m["confidence_head"].update(taps=[0, 2]), "taps (0, 2)"),
        (lambda m: m["latent"].update(channels=7), "7"),
        (lambda m: m["files"][0].update(path="../generator.safetensors"), "../generator.safetensors"),
    ],
)
def test_manifests(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(bundle, change)
    refused(BundleError, f"{bundle} … {message}", lambda: load(bundle))


def test_export_that_does_not_fit_its_form(causal: Runtime, many_step: Runtime, tmp_path: Path) -> None:
    for runtime, chunk in ((causal, None), (many_step, 3)):
        call = lambda r=runtime, c=chunk: dsa_rt.export(  # noqa: E731
            tmp_path / "x", name="x", model=r.model, codec=r.codec, text_encoder=r.text_encoder,
            schedule=r.manifest.schedule, size=r.manifest.size, chunk_frames=c,
        )  # fmt: skip
        refused(OptionError, "chunk_frames belongs to a causal generator", call)
    assert not (tmp_path / "x").exists()
