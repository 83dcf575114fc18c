"""``python -m bench.peers``: its ratios, what it says about targets, and all of it once on tiny bundles."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_bundle

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is no part of the package
from bench.peers import __main__ as peers


def test_ratios_go_round_by_round() -> None:
    figures = {"fast": ("ours", "peer", 1.5), "slow": ("peer", "ours", 1.5), "free": ("ours", "peer", None),
               "absent": ("ours", "nobody", 1.1)}  # fmt: skip
    taken = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 3.0, 8.0]}
    found = peers.ratios(taken, figures)
    assert found["fast"]["each"] == [3.0, 1.5, 2.0] and found["fast"]["ratio"]["median"] == 2.0
    assert [found[name]["met"] for name in ("fast", "slow", "free")] == [True, False, None]
    assert "absent" not in found and peers.missing(found, figures) == ["absent"]


def test_a_peer_that_fails_is_refused_and_ours_is_not() -> None:
    def fails(_: int) -> float:
        raise RuntimeError("no\ncompiler")

    result = peers.measure(peers.Ways({"ours": lambda _: 1.0, "theirs": fails}), 3, True)
    assert result["refused"] == {"theirs": "RuntimeError: no compiler"} and result["seconds"] == {"ours": [1.0] * 3}
    with pytest.raises(RuntimeError, match="compiler"):
        peers.measure(peers.Ways({"ours": fails}), 3, True)


def test_another_computation_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BOUND", 1e-12)
    with pytest.raises(RuntimeError, match="more than 1e-12; nothing was timed"):
        run(tmp_path, "--rounds", "1")


def test_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(tmp_path, "--rounds", "2")
    result = json.loads((tmp_path / "peers.json").read_text())
    assert result["program"] == "bench.peers" and max(result["largest_difference_fp32"].values()) < 1e-3
    assert len(result["largest_difference_fp32"]) == 5
    streaming, many = result["streaming"], result["many_step"]
    for part in (streaming, many):
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in part["seconds"].values())
        assert part["warm_up"].keys() == part["seconds"].keys()
    assert streaming["refused"] == {"plain loop, FlashAttention": "FlashAttention has no kernel for a CPU"}
    assert many["refused"] == {"diffusers, torch.compile": "left out with --no-compile"}
    assert streaming["ratios"].keys() == peers.STREAMING.keys() and len(many["ratios"]) == 3
    met = [row["met"] for part in (streaming, many) for row in part["ratios"].values()]
    printed = capsys.readouterr().out
    assert code == int(False in met) and printed.count("MISSED") == 2 * met.count(False)
    assert "not run: diffusers, torch.compile" in printed and "DSA end to end, plain loop at the same NFE" in printed


def test_random_weights(tmp_path: Path) -> None:
    code = peers.main([
        "--size", "tiny", "--frames", "33", "--height", "16", "--width", "32", "--policy", "scripted:1", "--dtype",
        "fp32", "--steps", "2", "--rounds", "1", "--no-compile", "--threads", str(torch.get_num_threads()), "--out",
        str(tmp_path), "--quiet",
    ])  # fmt: skip
    result = json.loads((tmp_path / "peers.json").read_text())
    assert code in (0, 1) and result["random_weights"] is True
    assert result["largest_difference_fp32"].keys() >= {"plain loop, dense", "plain loop, scripted:0", "diffusers"}


def run(folder: Path, *options: str) -> int:
    bundles = [make_bundle(folder / form, form) for form in ("causal", "bidirectional")]
    return peers.main([
        "--bundle", str(bundles[0]), "--many-step", str(bundles[1]), "--dtype", "fp32", "--steps", "2", "--no-compile",
        "--threads", str(torch.get_num_threads()), "--out", str(folder), "--quiet", *options,
    ])  # fmt: skip
