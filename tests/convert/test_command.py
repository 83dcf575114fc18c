"""`dsa-rt export`: options, JSON, errors on one line, and a run of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published import CHANNELS, original_state, transformer
from safetensors.torch import save_file

from dsa_rt.bundle import open_bundle
from dsa_rt.cli import main
from dsa_rt.codec.tiny import TinyCodec, TinyConfig

from .conftest import Published


def test_exports_and_generates(published: Published, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, bundle = published("t2v"), tmp_path / "b"
    capfd.readouterr()
    assert main(["export", str(source), str(bundle), "--dtype", "bf16", "--steps", "3", "--shard-size", "30KB"]) == 0
    shown = capfd.readouterr()
    assert "wan-vae" in shown.out and "umt5" in shown.out and "bfloat16" in shown.out and shown.err == ""
    assert open_bundle(bundle).manifest.schedule.steps == 3
    video = tmp_path / "clip.npy"
    run = ["generate", "a red ball", "--bundle", str(bundle), "--height", "32", "--width", "32", "--frames", "5"]
    assert main([*run, "--dtype", "fp32", "--out", str(video), "--quiet"]) == 0
    whole = np.load(video)
    tiny = TinyCodec(TinyConfig(CHANNELS, (4, 4, 4, 4)))
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    decoder = ["--decoder", str(tmp_path / "tiny.safetensors")]
    assert main([*run, *decoder, "--dtype", "fp32", "--out", str(video), "--quiet"]) == 0
    assert np.load(video).shape == whole.shape and not np.array_equal(np.load(video), whole)


def test_json_and_all_options(published: Published, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"generator": original_state(transformer(1, 1, 128))}, tmp_path / "sf.pt")
    given = {"weights": "raw", "timesteps": "1000,500", "shift": 3, "guidance-scale": 1, "height": 64, "width": 96,
             "frames": 9, "fps": 8, "chunk-frames": 1, "window": 6, "sink": 2, "name": "mine", "form": "causal",
             "dtype": "fp32"}  # fmt: skip
    options = ["--json", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]
    source, dest = str(tmp_path / "sf.pt"), str(tmp_path / "b")
    assert main(["export", source, dest, "--components", str(published("t2v")), *options]) == 0
    shown = capfd.readouterr()
    record = json.loads(shown.out)
    assert record["name"] == "mine" and record["schedule"]["steps"] == [1000.0, 500.0] and record["fps"] == 8.0
    assert (record["chunk_frames"], record["window"], record["sink"]) == (1, 6, 2)
    assert record["size"] == {"height": 64, "width": 96, "frames": 9}
    assert record["text_encoder"]["kind"] == "umt5" and record["training"]["weights"] == "generator"


def test_what_is_lacking_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file(original_state(transformer(1, 1, 128)), tmp_path / "wan.safetensors")
    assert main(["export", str(tmp_path / "wan.safetensors"), str(tmp_path / "b")]) == 0
    assert "no codec and no text_encoder" in capfd.readouterr().err
    assert main(["generate", "x", "--bundle", str(tmp_path / "b"), "--out", str(tmp_path / "x.npy"), "--quiet"]) == 3
    assert "was exported without its codec" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["none", "b"], 3, "there is no checkpoint"),
        (["wan.safetensors", "b", "--shard-size", "huge"], 2, "--shard-size is 'huge'"),
        (["wan.safetensors", "b", "--timesteps", "1000;500"], 2, "--timesteps is '1000;500'"),
        (["wan.safetensors", "b", "--taps", "1.5"], 2, "--taps is '1.5'"),
        (["wan.safetensors", "b", "--taps", "1"], 2, "has no confidence head"),
        (["wan.safetensors", "b", "--window", "3"], 2, "window: only causal generators have that"),
        (["wan.safetensors", "b", "--shift", "-1"], 3, "shift is -1"),
        (["wan.safetensors", "no/b"], 4, "there is no folder"),
        (["wan.safetensors", "wan.safetensors"], 4, "exists"),
        (["wan.safetensors", "b", "--steps", "3", "--timesteps", "5"], 2, "not allowed with"),
    ],
)
def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_file(original_state(transformer(1, 1, 128)), tmp_path / "wan.safetensors")
    assert main(["export", *options]) == code
    shown = capfd.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["wan.safetensors"]
