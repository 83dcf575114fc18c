"""The records: derived figures against sums done by hand, JSON there and back, and the hash of the frames."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys

import pytest
import torch

from dsa_rt.errors import OptionError
from dsa_rt.stats import ChunkStats, Stats, frames_sha256, peak_memory


def random_stats(seed: int, chunks: int = 5, scheduled: int = 4) -> Stats:
    draw = random.Random(seed)
    made = []
    for index in range(chunks):
        passes = draw.randint(1, scheduled)
        made.append(
            ChunkStats(
                index=index,
                passes=passes,
                passes_scheduled=scheduled,
                frames=9 if index == 0 else 12,
                confidences=tuple(draw.choice([None, draw.random()]) for _ in range(passes)),
                refined=passes > 1,
                threshold=draw.choice([None, draw.random()]),
                tokens=108,
                active_tokens=tuple(draw.randint(1, 108) for _ in range(passes)),
                calls_per_pass=draw.choice([1, 2]),
                context_passes=draw.choice([0, 1]),
                denoise_ms=draw.uniform(1, 50),
                context_ms=draw.uniform(1, 50),
                decode_ms=draw.uniform(1, 50),
            )
        )
    return Stats(
        chunks=tuple(made),
        prompt='a "red" square – π',
        seed=draw.getrandbits(62),
        policy="dsa",
        text_ms=3.5,
        total_ms=draw.uniform(300, 900),
        time_to_first_frame_ms=41.5,
        peak_memory_bytes=10**9,
        planned_memory_bytes=10**8,
        frames_sha256="00" * 32,
        settings={"window": None, "sigmas": [1.0, 0.5]},
        backends={"renoise": "native"},
    )


@pytest.mark.parametrize("seed", range(5))
def test_derived_figures_are_the_sums_they_claim_to_be(seed: int) -> None:
    stats = random_stats(seed)
    calls = scheduled_calls = active = possible = 0
    denoise = context = decode = 0.0
    for chunk in stats.chunks:
        calls += chunk.passes * chunk.calls_per_pass + chunk.context_passes
        scheduled_calls += 4 * chunk.calls_per_pass + chunk.context_passes
        active += sum(chunk.active_tokens)
        possible += 4 * 108
        denoise, context, decode = (
            denoise + chunk.denoise_ms,
            context + chunk.context_ms,
            decode + chunk.decode_ms,
        )
    frames = 9 + 4 * 12
    assert (stats.frames, stats.model_calls, stats.model_calls_scheduled) == (frames, calls, scheduled_calls)
    assert stats.active_token_share == pytest.approx(active / possible)
    assert stats.fps_denoise == pytest.approx(frames / (denoise + context) * 1e3)
    assert stats.fps_with_decode == pytest.approx(frames / (denoise + context + decode) * 1e3)
    assert stats.fps_end_to_end == pytest.approx(frames / stats.total_ms * 1e3)
    assert [list(span) for span in stats.frame_spans()][1] == list(range(9, 21))


def test_nfe_of_the_paper() -> None:
    """Seven chunks with 1, 2, 3, 4 passes each are 14, 21, 28, 35 model calls (DSA, section on NFE)."""
    for passes, calls in ((1, 14), (2, 21), (3, 28), (4, 35)):
        chunks = tuple(ChunkStats(index=i, passes=passes, passes_scheduled=4, frames=12) for i in range(7))
        stats = Stats(chunks=chunks, prompt="", seed=0, policy="fixed")
        assert (stats.model_calls, stats.model_calls_scheduled) == (calls, 35)


@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip(seed: int) -> None:
    stats = random_stats(seed)
    text = json.dumps(stats.to_dict(), allow_nan=False)
    assert Stats.from_dict(json.loads(text)) == stats
    assert json.loads(text)["model_calls"] == stats.model_calls


def test_json_has_no_nan() -> None:
    chunk = ChunkStats(index=0, passes=1, passes_scheduled=1, frames=9, confidences=(float("nan"),))
    record = Stats(chunks=(chunk,), prompt="", seed=0, policy="dense").to_dict()
    assert json.loads(json.dumps(record, allow_nan=False))["chunks"][0]["confidences"] == [None]
    assert record["fps_end_to_end"] is None  # no time was measured, so there is no rate


def test_records_of_another_version_are_refused_by_name() -> None:
    record = random_stats(0).to_dict()
    with pytest.raises(OptionError, match="colour_of_the_sky"):
        Stats.from_dict({**record, "colour_of_the_sky": 1})
    del record["prompt"]
    with pytest.raises(OptionError, match="missing prompt"):
        Stats.from_dict(record)


def test_table_says_what_was_spent() -> None:
    stats = random_stats(3)
    text = stats.table()
    assert f"{stats.model_calls} of {stats.model_calls_scheduled}" in text
    assert f"{stats.fps_end_to_end:.1f} end to end" in text
    for chunk in stats.chunks:
        assert f"{chunk.passes}/4" in text
    assert len(random_stats(3, chunks=400).table().splitlines()) < 40


def test_hash_is_that_of_the_raw_bytes() -> None:
    frames = torch.randint(0, 256, (7, 4, 6, 3), dtype=torch.uint8)
    expected = hashlib.sha256(bytes(frames.flatten().tolist())).hexdigest()
    assert frames_sha256(frames) == expected
    assert frames_sha256([frames[:3], frames[3:]]) == expected
    assert (
        frames_sha256(frames.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)) == expected
    )  # strides do not matter
    frames[6, 3, 5, 2] ^= 1
    assert frames_sha256(frames) != expected


def test_peak_memory_sees_what_was_touched() -> None:
    """In a process of its own, as the peak of this one may already be higher."""
    code = (
        "from dsa_rt.stats import peak_memory; before = peak_memory(); data = bytearray(b'1') * 200_000_000; "
        "print(peak_memory() - before)"
    )
    grown = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert 190e6 < grown < 260e6
    assert peak_memory() > 10e6  # type: ignore[operator]
