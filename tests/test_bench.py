"""The benchmarks' arithmetic against independent oracles, and every program once on a tiny random bundle."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import randomise

import dsa_rt
from dsa_rt.bundle import Schedule, Size
from dsa_rt.codec.conv import ConvCodec, ConvCodecConfig
from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.demo.grammar import MAX_WORDS, VOCABULARY, format_scene, is_held_out
from dsa_rt.demo.score import score
from dsa_rt.demo.world import render
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.policy import Records, fit_calibration, simulate
from dsa_rt.progress import Event
from dsa_rt.runtime import Runtime
from dsa_rt.suite.clip import player

sys.path.append(str(Path(__file__).parents[1]))  # bench/ is no part of the package
from bench import allocation, common, engine, imports, memory, metrics, ops, pictures, quality, speed
from bench.evaluate import Job, evaluate_all
from bench.prompts import held_out_cases
from bench.recording import correlations, record_clip

FRAMES, CHUNKS, PASSES = 81, 7, 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 x 48 pixels, 81 frames, seven chunks, a head and a calibration; weights are random."""
    model = WanModel(WanConfig(48, 96, 2, 2, 4, 4, 16, MAX_WORDS, freq_dim=32, form="causal"))
    codec = ConvCodec(ConvCodecConfig(4, 8, 8, 1, 1, 1, 1))
    text = GrammarTextEncoder(GrammarTextConfig(len(VOCABULARY), MAX_WORDS, 16, 2, 1))
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (0, 1)))
    for seed, module in enumerate((model, codec, text, head)):
        randomise(module, seed, spread=3.0 if module is head else 1.0)
    path = tmp_path_factory.mktemp("bench") / "tiny"
    dsa_rt.export(
        path, name="tiny", model=model, codec=codec, text_encoder=text, head=head, dtype=torch.float32,
        schedule=Schedule(5.0, (1000.0, 750.0, 500.0, 250.0)), size=Size(48, 48, FRAMES), chunk_frames=3,
        calibration=fit_calibration(synthetic_records(40)),
    )  # fmt: skip
    return path


def synthetic_records(clips: int) -> Records:
    """Chunks that differ in the error to be removed, and confidences that fall with it."""
    source = np.random.default_rng(7)
    size = source.exponential(1.0, (clips, CHUNKS, 1))
    error = size * np.array([1.0, 0.5, 0.2, 0.0])
    return Records(1 / (1 + error + source.normal(0, 0.05, error.shape) ** 2), error)


# Arithmetic -------------------------------------------------------------------------------------------------


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, from the definition, in float64; grey frames [H, W]."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_against_the_definition() -> None:
    source = np.random.default_rng(3)
    a = source.integers(0, 256, (2, 17, 14, 3), np.uint8)
    b = np.clip(a.astype(int) + source.integers(-60, 61, a.shape), 0, 255).astype(np.uint8)
    luma = np.array([0.299, 0.587, 0.114])
    expected = np.mean([naive_ssim(p @ luma, q @ luma) for p, q in zip(a, b, strict=True)])
    assert 0.3 < expected < 0.97
    assert metrics.ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-4)
    assert metrics.ssim(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(1, abs=1e-6)


def test_psnr() -> None:
    a = torch.full((2, 4, 4, 3), 10, dtype=torch.uint8)
    assert metrics.mean_squared_error(a, a + 5) == 25
    assert metrics.psnr(25) == pytest.approx(20 * math.log10(255 / 5))
    assert metrics.psnr(0) == math.inf


def test_spearman_with_ties_and_without() -> None:
    source = np.random.default_rng(5)
    a, b = source.normal(size=50), source.normal(size=50)
    d = np.array([(a < x).sum() - (b < y).sum() for x, y in zip(a, b, strict=True)])
    assert metrics.spearman(a, b) == pytest.approx(1 - 6 * (d**2).sum() / (50 * (50**2 - 1)))
    assert metrics.spearman(a, -np.exp(a)) == pytest.approx(-1)
    tied = source.integers(0, 4, 30).astype(float)
    by_hand = [1 + (tied < x).sum() + ((tied == x).sum() - 1) / 2 for x in tied]
    assert metrics.ranks(tied).tolist() == by_hand
    assert metrics.spearman(np.ones(9), a[:9]) is None


def test_hull_is_the_upper_one() -> None:
    points = np.random.default_rng(1).random((40, 2))
    curve = allocation.hull(map(tuple, points))
    for x, y in points:
        value = allocation.at(curve, x)
        assert value is not None and value >= y - 1e-12
    assert all(any(np.allclose(corner, point) for point in points) for corner in curve)
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.pairwise(curve)]
    assert slopes == sorted(slopes, reverse=True)
    assert allocation.at(curve, 2.0) is None


def test_captured_curves_keep_their_order() -> None:
    records = synthetic_records(30)
    calibration = fit_calibration(records)
    static = {name: allocation.captured(name, records, None) for name in quality.STATIC}
    curves = allocation.curves(records, calibration, static)
    for calls in (19.0, 24.0, 27.5):
        oracle, random, fixed, ours = (
            allocation.at(curves[k], calls) for k in ("oracle", "random", "static", "calibrated")
        )
        assert oracle is not None and random is not None and fixed is not None and ours is not None
        assert oracle >= ours > random  # this head is honest, so it beats chance
        assert oracle >= fixed
    replayed = simulate("dsa-calibrated:calls=24", records, calibration)
    assert allocation.at(curves["calibrated"], replayed["model_calls"]) == pytest.approx(replayed["captured"])


def test_stall_is_what_a_player_waits() -> None:
    frames, fps = [8, 8, 8], 16.0  # 500 ms a chunk
    assert player([100, 400, 1000], frames, fps)[1] == 0
    assert player([100, 700, 1150], frames, fps)[1] == pytest.approx(100)
    assert player([100, 700, 1500], frames, fps)[1] == pytest.approx(400)


def test_growth_is_seen_and_noise_is_not() -> None:
    noise = np.random.default_rng(2).normal(0, 5e5, 300)
    assert memory.summarise((3e8 + noise).astype(int).tolist())["flat"]
    leak = memory.summarise((3e8 + noise + 1e5 * np.arange(300)).astype(int).tolist())
    assert not leak["flat"] and leak["growth"] == pytest.approx(0.1 * 269, rel=0.05)


def test_a_slower_end_is_seen_and_noise_is_not() -> None:
    noise = np.random.default_rng(3).normal(5, 0.5, 800)
    assert memory.drift(noise.tolist())["flat"] and memory.drift((noise + np.linspace(1, 0, 800)).tolist())["flat"]
    slower = memory.drift((noise * np.linspace(1, 1.4, 800)).tolist())
    assert not slower["flat"] and slower["ratio"] == pytest.approx(1.26, rel=0.05)


def test_points_in_one_place_share_a_label() -> None:
    points = {"a": (0.0, 0.0), "b": (10.0, 100.0), "c": (10.1, 99.0), "d": (10.0, 90.0)}
    assert pictures._together(points) == [["a"], ["b", "c"], ["d"]]
    assert pictures._together({}) == [] and pictures._together({"a": (1.0, 1.0)}) == [["a"]]


def test_table_and_json(tmp_path: Path) -> None:
    lines = common.table(["a", "b"], [["long name", "1"], ["x", "12345"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].endswith("-:|")
    path = common.write_json(
        tmp_path / "new", "x.json", {"inf": math.inf, "array": np.arange(2), "path": Path("p")}
    )
    assert json.loads(path.read_text()) == {"inf": None, "array": [0, 1], "path": "p"}


# Prompts and records ----------------------------------------------------------------------------------------


def test_cases_are_held_out_and_differ() -> None:
    cases = held_out_cases(200)
    assert cases[:7] == held_out_cases(7)
    assert len({case.prompt for case in cases}) == 200
    assert all(is_held_out(case.scene) and format_scene(case.scene) == case.prompt for case in cases)


def test_records_are_those_of_the_runtime(bundle: Path) -> None:
    runtime = dsa_rt.load(bundle, dtype="fp32")
    generate = runtime.compile(policy="dense")
    case = held_out_cases(1)[0]
    record = record_clip(generate, case.prompt, case.seed)
    video = generate(case.prompt, case.seed)
    assert isinstance(video, dsa_rt.Video) and video.latents is not None
    assert torch.equal(record.latents, video.latents)
    assert record.error.shape == record.confidence.shape == (CHUNKS, PASSES)
    assert (record.error[:, -1] == 0).all() and (record.error[:, :-1] > 0).all()

    # One pass for the first chunk instead of four: that chunk moves by as much as the record says.
    hasty = runtime.compile(policy=dsa_rt.Fixed(passes=4, first=1))(case.prompt, case.seed)
    assert isinstance(hasty, dsa_rt.Video) and hasty.latents is not None
    moved = (hasty.latents - video.latents)[:, :3].double().square().mean()
    assert float(moved) == pytest.approx(record.error[0, 0], rel=1e-5)

    seen: list[float | None] = []

    def listen(event: Event) -> None:
        if event.kind == "pass":
            seen.append(event.confidence)

    runtime.compile(policy="dsa-paper")(case.prompt, case.seed, on_event=listen)
    assert seen[0] == pytest.approx(record.confidence[0, 0], rel=1e-6)


def test_correlations_find_what_is_there() -> None:
    records = synthetic_records(20)
    found = correlations(records, held_out_cases(20))
    assert found["overall"] < -0.9 and found["later_chunks"] < -0.9 and found["within_clips"] < -0.8
    assert sum(entry["clips"] for entry in found["by_motion"].values()) >= 20
    upside_down = correlations(Records(1 - records.confidence, records.error), held_out_cases(20))
    assert upside_down["overall"] > 0.9


# Programs ---------------------------------------------------------------------------------------------------


def read(folder: Path, name: str) -> dict[str, Any]:
    result = json.loads((folder / name).read_text())
    for key in ("program", "date", "machine", "versions", "settings", "warm_up", "included"):
        assert result[key], key
    assert "commit" in result and "out" not in result["settings"]
    return result


def test_quality(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = quality.default_rows(CHUNKS, PASSES)
    chosen = [name for name in every if "fixed-3" not in name and "calls=21" not in name]
    code = quality.main(
        ["--bundle", str(bundle), "--dtype", "fp32", "--prompts", "2", "--workers", "0", "--threads", "1",
         "--timing-clips", "1", "--out", str(tmp_path), "--quiet", "--rows", " ".join(chosen)]
    )  # fmt: skip
    assert code == 1  # random weights reach nothing
    result = read(tmp_path, "quality.json")
    rows = result["rows"]
    assert list(rows) == chosen and len(every) == 14 and not result["refused"]
    assert rows["dense"]["identical_clips"] == 2
    assert (rows["dense"]["captured"], rows["fixed-1"]["captured"]) == (1, 0)
    assert [rows[n]["calls"] for n in ("fixed-1", "fixed-2", "fixed-4-then-1", "dense")] == [14, 21, 17, 35]
    assert (
        rows["dsa-calibrated:calls=24.5"]["calls"]
        == rows["dsa-calibrated:calls=24.5"]["calls_replayed"]
        == 24
    )
    assert 0 < rows["fixed-1"]["psnr"] < 60 and rows["fixed-1"]["identical_clips"] == 0
    judged = [score(render(c.scene, c.seed, FRAMES, 48), c.scene).attributes for c in held_out_cases(2)]
    assert result["bounds"]["ground truth"]["score"] == pytest.approx(np.mean(judged)) and sum(judged) > 0
    assert set(result["timing"]) == set(rows)
    clips = json.loads((tmp_path / "quality-clips.json").read_text())["clips"]
    assert [clip["number"] for clip in clips] == [0, 1]
    for name in ("quality-scatter.png", "quality-calls.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "MISSED" in shown and "dsa-paper-retest" in shown


def test_quality_says_what_cannot_run(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.main(
        ["--bundle", str(bundle), "--prompts", "1", "--workers", "0", "--threads", "1", "--timing-clips", "0",
         "--rows", "dense fixed-9", "--out", str(tmp_path), "--quiet"]
    )  # fmt: skip
    assert list(read(tmp_path, "quality.json")["refused"]) == ["fixed-9"]
    assert "not run: fixed-9" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_make_the_same_clips(bundle: Path) -> None:
    job, cases = Job(str(bundle), "fp32", None, ("dense", "dsa-paper")), held_out_cases(2)
    here = list(evaluate_all(job, cases, 0))
    there = sorted(evaluate_all(job, cases, 1), key=lambda result: result["number"])
    assert here == there


def test_speed(bundle: Path, tmp_path: Path) -> None:
    speed.main(
        ["--bundle", str(bundle), "--threads", "1", "--runs", "2", "--warm-up", "1", "--out", str(tmp_path),
         "--policies", "dense dsa-calibrated:calls=24", "--quiet"]
    )  # fmt: skip
    rows = read(tmp_path, "speed.json")["rows"]
    assert [row["model_calls_mean"] for row in rows.values()] == [34, 23]  # no context pass after the last chunk
    for row in rows.values():
        fps = [row[f"fps_{kind}"]["median"] for kind in ("denoise", "with_decode", "end_to_end")]
        assert fps == sorted(fps, reverse=True)
        assert row["first_frames_early"] and row["passes_before_first_frame"] == 0
        assert row["between_chunks_ms"]["n"] == 2 * (CHUNKS - 1)


def test_engine(bundle: Path, many_step: Runtime, tmp_path: Path) -> None:
    arguments = ["--bundle", str(bundle), "--many-step", str(many_step.bundle.path), "--runs", "1", "--policies", "dsa",
                 "--many-step-policies", "hsa-25", "--out", str(tmp_path), "--quiet"]  # fmt: skip
    assert engine.main(arguments) == 0
    few, many = json.loads((tmp_path / "engine.json").read_text())["policies"].values()
    assert [*few] == [row.name for row in engine.ROWS] and [*many] == ["called", "recorded"]
    for table in (few, many):
        first, *_ = table.values()
        assert all(row["median"] > 0 for row in table.values()) and first["over_first"] == 1


def test_memory(bundle: Path, tmp_path: Path) -> None:
    memory.main(
        ["--bundle", str(bundle), "--threads", "1", "--generations", "6", "--stream-frames", "100",
         "--policy", "dsa-calibrated:passes=2.5", "--out", str(tmp_path), "--quiet"]
    )  # fmt: skip
    parts = read(tmp_path, "memory.json")["parts"]
    assert parts["generations"]["count"] == 6 and parts["endless stream"]["count"] == 9
    assert all(size > 50 for part in parts.values() for size in part["sizes"])


def test_ops(tmp_path: Path) -> None:
    ops.main(
        ["--threads", "1", "--samples", "1", "--shapes", "demo chunk", "--layers", "demo chunk", "--attention",
         "demo chunk", "--linear", "48 x 192 -> 192", "48 x 192 -> 512 gelu", "--out", str(tmp_path), "--quiet"]
    )  # fmt: skip
    rows = read(tmp_path, "ops.json")["rows"]
    assert len(rows) == 8 and all(row["native_us"] > 0 and row["copy_gb_s"] > 0 for row in rows.values())
    assert rows["renoise, demo chunk, bf16"]["bytes"] == 4 * 108 * 32 * 2
    layers = read(tmp_path, "ops.json")["layers"]
    assert len(layers) == 16 and layers["qk_norm_rope_store, demo chunk, fp32"]["bytes"] == 6 * 108 * 192 * 4
    assert all(row["times_as_fast"] == pytest.approx(row["torch_us"] / row["native_us"]) for row in layers.values())
    pool = layers["confidence_pool, demo chunk, fp32"]
    assert pool["operations"] == 108 * 192 * (2 * 3 + 4)
    floor = max(1e-3 * pool["bytes"] / pool["copy_gb_s"], 1e-3 * pool["operations"] / pool["product_gflop_s"])
    assert pool["share_of_floor"] == pytest.approx(floor / pool["native_us"])
    assert layers["quantize_rows, demo chunk, bf16"]["bytes"] == 108 * (192 * 3 + 3 * 4)
    pairs = [*read(tmp_path, "ops.json")["attention"].values(), *read(tmp_path, "ops.json")["attention_fp8"].values()]
    assert len(pairs) == 4 and {row["operations"] for row in pairs} == {4 * 3 * 108 * 756 * 64}
    products = read(tmp_path, "ops.json")["linear"]
    assert {row["operations"] for row in products.values()} == {2 * 48 * 192 * n for n in (192, 512)}
    for row in (*pairs, *products.values()):
        assert row["times_as_fast"] == pytest.approx(row["torch_us"] / row["native_us"])


def test_ops_refuses_a_wrong_kernel() -> None:
    op = ops.OPS["philox_normal"]((1, 4, 8), torch.float32)

    def broken() -> None:
        op.native()
        op.outputs[0][0, 3, 7] += 1

    with pytest.raises(RuntimeError, match="differ"):
        ops.check(dataclasses.replace(op, native=broken), "philox_normal")


def test_ops_refuses_a_layer_kernel_that_is_too_far_off() -> None:
    op = ops.LAYER_OPS["norm_modulate"]((1, 6, 2, 4), torch.float32)
    ops.check(op, "norm_modulate")

    def broken() -> None:
        op.native()
        op.outputs[0][0, 3, 7] += 0.01

    with pytest.raises(RuntimeError, match="differ"):
        ops.check(dataclasses.replace(op, native=broken), "norm_modulate")


def test_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durations = dict(zip(imports.STATEMENTS, (1.0, 1.2, 1.7), strict=True))
    monkeypatch.setattr(imports, "seconds", durations.__getitem__)
    assert imports.main(["--runs", "3", "--out", str(tmp_path), "--quiet"]) == 1
    rows = read(tmp_path, "imports.json")["rows"]
    assert [round(row["adds"], 6) for row in rows.values()] == [0, 0.2, 0.7]
    assert [row["within_bound"] for row in rows.values()] == [True, True, False]


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = common.run(lambda: speed.main(["--bundle", str(tmp_path / "none"), "--threads", "1"]))
    assert code == 2 and capsys.readouterr().err.count("\n") == 1
