"""What is measured: figures against sums by hand, a player by simulation, and what cannot run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsa_rt.errors import OptionError
from dsa_rt.suite import device, measure
from dsa_rt.suite.clip import player
from dsa_rt.suite.schema import read, validate

from .small import SMALL, small


def test_written_and_read_back(result_file: Path, result: dict[str, Any]) -> None:
    validate(result)
    assert read(result_file) == result
    assert [case["name"] for case in result["cases"]] == ["dense", "refined", "many", "batch"]
    assert result["not_run"] == {
        "too-large": "it needs a CUDA device, and torch sees none",
        "wrong": "PolicyError: policy scripted:9 refines chunk 9, but the clip has 3 chunks",
    }
    assert result["gpu"] is None and result["settings"]["runs"] == 5
    assert all(case["random_weights"] and len(case["runs"]) == 5 for case in result["cases"])


def test_figures_are_those_of_the_runs(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        for name, spread in case["figures"].items():
            values = [run[name] for run in case["runs"]]
            if spread is None:
                assert values == [None] * 5
                continue
            assert spread["n"] == 5
            expected = np.percentile(values, [50, 20, 80])
            assert [spread[key] for key in ("median", "p20", "p80")] == pytest.approx(expected)
        gaps = [gap for run in case["runs"] for gap in run["gaps_ms"]]
        if gaps:
            points = case["between_chunks_ms"]
            assert points["n"] == len(gaps) == 10
            assert [points[key] for key in ("p50", "p95", "p99")] == pytest.approx(np.percentile(gaps, [50, 95, 99]))
        else:
            assert case["between_chunks_ms"] is None and case["name"] in ("many", "batch")
        peak, roof = result["peaks"][case["peak"]], case["roofline"]
        intensity = 1000 * case["runs"][0]["tflop"] / case["runs"][0]["gbytes"]
        assert roof["flop_per_byte"] == pytest.approx(intensity)
        assert roof["roof_tflop_s"] == pytest.approx(min(peak["tflop_s"], intensity * peak["gb_s"] / 1000))
        assert roof["share"] == pytest.approx(case["figures"]["tflop_s"]["median"] / roof["roof_tflop_s"])


def test_runs_are_of_the_same_clip_and_say_what_was_computed(result: dict[str, Any]) -> None:
    expected = {"dense": (14, 1.0), "refined": (11, 0.75), "many": (20, 0.5), "batch": (10, 0.25)}
    for case in result["cases"]:
        for run in case["runs"]:
            share = run["active_token_share"]
            assert (run["nfe"], pytest.approx(share, abs=0.02)) == expected[case["name"]]
            assert run["frames"] == (66 if case["name"] == "batch" else 33) and sum(run["chunk_frames"]) == 33
            denoise = run["denoise_ms"] + run["context_ms"]
            assert run["fps_denoise"] == pytest.approx(1000 * run["frames"] / denoise)
            assert run["fps_with_decode"] == pytest.approx(1000 * run["frames"] / (denoise + run["decode_ms"]))
            assert run["fps_end_to_end"] == pytest.approx(1000 * run["frames"] / run["total_ms"])
            assert run["tflop_s"] == pytest.approx(1000 * run["tflop"] / denoise)
            assert run["first_frame_ms"] + sum(run["gaps_ms"]) == pytest.approx(run["total_ms"])
            assert run["energy_j"] is None
    dense, refined = (next(c for c in result["cases"] if c["name"] == name) for name in ("dense", "refined"))
    assert refined["runs"][0]["tflop"] < dense["runs"][0]["tflop"]


def test_around_the_runs(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        assert case["warm_up"]["ended_by"] == "seconds" and case["warm_up"]["runs"] == 1  # it was given none
        memory = case["memory"]
        assert memory["of"] == "process" and memory["planned_bytes"] > memory["planned_weights_bytes"] > 0
        assert memory["missing"] is not None or memory["peak_bytes"] > 50e6
        assert case["compile_s"] > 0 and case["energy_missing"] == "a CPU has no counter that the suite reads"
    events = result["timeline"]["events"]
    assert result["timeline"]["case"] == "refined"
    assert [e["chunk"] for e in events if e["kind"] == "chunk"] == [0, 1, 2]
    assert sum(e["kind"] == "pass" for e in events) == 9
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(events))


@pytest.mark.parametrize("seed", range(20))
def test_player(seed: int) -> None:
    """Against one that shows frame by frame."""
    source = np.random.default_rng(seed)
    frames, fps = source.integers(1, 13, 6).tolist(), 16.0
    arrived = np.cumsum(source.uniform(50, 900, 6)).tolist()
    misses, stall = player(arrived, frames, fps)
    clock = patient = arrived[0]
    late, waited = 0, 0.0
    for at, count in zip(arrived, frames, strict=True):
        late += at > clock + 1e-9
        if at > patient:
            waited += at - patient
            patient = at
        for _ in range(count):
            clock += 1000 / fps
            patient += 1000 / fps
    assert (misses, stall) == (late, pytest.approx(waited))


def test_peaks_count_operations_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_best", lambda run, _: run() is None or 0.5)
    found = device.peaks(torch.device("cpu"), torch.float32, small=True)
    assert found["tflop_s"] == 2 * 64**3 / 0.5 / 1e12 and found["gb_s"] == 2 * 65536 / 0.5 / 1e9
    assert found["matmul"] == [64, 64, 64] and found["dtype"] == "float32" and found["n"] == device.SAMPLES


def test_peak_memory_sees_what_was_there_for_a_moment() -> None:
    with device.PeakMemory(torch.device("cpu")) as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    if peak.missing is None:
        assert peak.bytes is not None and peak.before is not None and peak.bytes - peak.before > 48 << 20
        with device.PeakMemory(torch.device("cpu")) as after:
            pass
        assert after.bytes is not None and after.bytes < peak.bytes - (32 << 20)  # it forgets
    else:
        assert peak.bytes is None and "cannot be reset" in peak.missing


def test_fewer_than_five_runs_say_nothing() -> None:
    with pytest.raises(OptionError, match="runs is 4; expected 5 or more"):
        measure.measure(SMALL, runs=4)


def test_a_bundle_shares_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    build = measure.random_runtime
    monkeypatch.setattr(measure, "random_runtime", lambda *given: made.append(given[1]) or build(*given))
    ready, not_run = measure.prepare([small("a"), small("b", policy="fixed-1"), small("c", "bidirectional")], "cpu")
    assert made == ["causal", "bidirectional"] and not not_run and ready["a"].load_s == ready["b"].load_s
    assert ready["a"].generate.runtime is ready["b"].generate.runtime


def test_what_is_written_is_plain_json(result_file: Path) -> None:
    json.loads(result_file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
