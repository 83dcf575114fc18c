"""The HSA benchmarks: rivals against runs written out step by step, the arithmetic of tables, each program once."""

from __future__ import annotations

import json
import math
import pickle
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import randomise
from torch import Tensor

import dsa_rt
from dsa_rt.bundle import Schedule, Size
from dsa_rt.codec.conv import ConvCodec, ConvCodecConfig
from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.demo.grammar import MAX_WORDS, VOCABULARY
from dsa_rt.errors import DsaRtError
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import HSA

sys.path.append(str(Path(__file__).parents[1]))  # bench/ is no part of the package
from bench.hsa import pictures, quality, rows, speed, strength
from bench.hsa.__main__ import main
from bench.hsa.allocated import Allocated, ByScore, score
from bench.hsa.clip import Clip, Meter, Regime, Studio, measure
from bench.hsa.evaluate import latent_psnr
from bench.hsa.ras import RAS
from bench.hsa.skipping import EasyCache, TeaCache, fit_polynomial

REGIME = Regime("test", 3.0, 4.0)
FRAMES, GRID = 3, TokenGrid(2, 3)  # 18 tokens
PROMPT = "a red circle bouncing on a striped ground"


@pytest.fixture(scope="module")
def clip() -> Clip:
    model = WanModel(WanConfig(48, 80, 2, 2, 3, 3, 20, 7, freq_dim=32))
    randomise(model, 5)
    with torch.no_grad():
        for block in model.blocks:
            block.cross_attn.o.weight.mul_(5)  # type: ignore[union-attr, operator]  # branches that differ
    model.requires_grad_(False).eval()
    text, empty = model.embed_text(torch.randn(1, 7, 20)), model.embed_text(torch.randn(1, 7, 20))
    return Clip(model, GRID, range(FRAMES), text, empty, REGIME, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 x 48 pixels and 81 frames, which a score needs, of 189 tokens; weights are random."""
    model = WanModel(WanConfig(48, 96, 2, 1, 4, 4, 16, MAX_WORDS, freq_dim=32))
    codec = ConvCodec(ConvCodecConfig(4, 8, 8, 1, 1, 1, 1))
    text = GrammarTextEncoder(GrammarTextConfig(len(VOCABULARY), MAX_WORDS, 16, 2, 1))
    for seed, module in enumerate((model, codec, text)):
        randomise(module, seed)
    path = tmp_path_factory.mktemp("bench") / "tiny"
    dsa_rt.export(
        path, name="tiny", model=model, codec=codec, text_encoder=text, head=None, dtype=torch.float32,
        schedule=Schedule(5.0, 40), size=Size(48, 48, 81), chunk_frames=None, guidance=2.5,
    )  # fmt: skip
    return path


def guided(clip: Clip, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """(the prompt's velocity, the guided one) by two plain calls of the model."""
    assert clip.empty is not None
    t = torch.full((1, 1), 1000 * sigma)
    yes, no = (clip.model(x, clip.dense, t, text).velocity for text in (clip.text, clip.empty))
    return yes, no + clip.regime.guidance * (yes - no)


def skipped_run(clip: Clip, steps: int, computed: set[int], offset: bool) -> Tensor:
    """Euler in which other steps reuse the last velocity or, with offset, the last velocity minus x, plus x."""
    x, kept = clip.noise(), torch.zeros(())
    for step, (sigma, following) in enumerate(pairwise(clip.sigmas(steps))):
        if step in computed:
            kept = guided(clip, x, sigma)[1] - (x if offset else 0)
        x = x + (following - sigma) * (kept + (x if offset else 0))
    return x


# Methods ----------------------------------------------------------------------------------------------------


def test_dense_is_the_runtimes(bundle: Path) -> None:
    """What rows are held against is what compile makes, frames and all."""
    studio = Studio(str(bundle), "fp32")
    run = measure(Allocated(5), studio.clip(PROMPT, 4, studio.own_regime("own")))
    video = dsa_rt.load(bundle, dtype="fp32").compile(policy="dense", steps=5)(PROMPT, 4)
    assert isinstance(video, dsa_rt.Video) and video.latents is not None
    assert torch.equal(studio.settings.grid.unpatchify(run.rows)[0], video.latents)
    assert torch.equal(studio.decode(run.rows), video.frames)


def test_nothing_skipped_is_dense(clip: Clip) -> None:
    expected = measure(Allocated(6), clip)
    assert (expected.steps == 6).all()
    for method in (TeaCache(-math.inf, (0.0, 1.0), 6), EasyCache(0.0, 1, 6), RAS(1.0, 6, 1, ()), RAS(0.1, 6, 6, ())):
        run = measure(method, clip)
        assert torch.allclose(run.rows, expected.rows, atol=1e-4), method
        assert torch.equal(run.steps, expected.steps)


def test_teacache_skips_by_the_sum(clip: Clip) -> None:
    """A constant polynomial of 1: with threshold 2.5 every third step after the first is computed, and the last."""
    with torch.no_grad():
        run = measure(TeaCache(2.5, (1.0,), 9), clip)
    assert (run.steps == 4).all()  # 0, 3, 6 and 8
    # What is reused is the residual of the blocks, so the head sees each step's own input and time.
    model, x, residuals = clip.model, clip.noise(), []
    for step, (sigma, following) in enumerate(pairwise(clip.sigmas(9))):
        t, found = torch.full((1, 1), 1000 * sigma), []
        for branch, text in enumerate(clip.texts()):
            if step in (0, 3, 6, 8):
                out = model(x, clip.dense, t, text, None, (1,))
                residuals = residuals[: 2 * (branch > 0)] if branch else []
                found.append(out.velocity)
                residuals.append(out.taps[0] - model.patch_embedding(x))
            else:
                hidden = torch.nn.functional.layer_norm(model.patch_embedding(x) + residuals[branch], (48,), eps=1e-6)
                time = model.embed_timesteps(t)[0][0, 0]
                shift, gain = model.head.modulation[0, 0] + time, model.head.modulation[0, 1] + time
                found.append(model.head.head(hidden * (1 + gain) + shift))
        x = x + (following - sigma) * (found[1] + 3.0 * (found[0] - found[1]))
    assert torch.allclose(run.rows, x, atol=1e-4)


def test_easycache_against_the_rule_written_out(clip: Clip) -> None:
    steps, warm_up, threshold = 14, 3, 1.0
    computed, x, before, error, rate = [], clip.noise(), None, 0.0, 0.0
    last: tuple[Tensor, Tensor] | None = None
    offset = torch.zeros(())
    for step, (sigma, following) in enumerate(pairwise(clip.sigmas(steps))):
        if step >= warm_up:
            assert before is not None and last is not None
            error += rate * float((x - before).abs().mean() / last[1].abs().mean())
        if step < warm_up or step == steps - 1 or error >= threshold:
            computed.append(step)
            velocity, mixed = guided(clip, x, sigma)
            if last is not None:
                rate = float((velocity - last[1]).abs().mean() / (x - last[0]).abs().mean())
            last, offset, error = (x, velocity), mixed - x, 0.0
        before, x = x, x + (following - sigma) * (x + offset)
    run = measure(EasyCache(threshold, warm_up, steps), clip)
    assert warm_up + 1 < len(computed) < steps
    assert (run.steps == len(computed)).all()
    assert torch.allclose(run.rows, x, atol=1e-4)
    assert torch.allclose(run.rows, skipped_run(clip, steps, set(computed), offset=True), atol=1e-4)


def test_ras_takes_turns_and_resets(clip: Clip) -> None:
    method = RAS(0.25, 12, 2, (7,), starvation=50.0)  # so strong that the longest left out come first
    with Meter(clip.model, clip.tokens) as meter:
        seen: list[Tensor] = []
        hook = clip.model.register_forward_hook(lambda m, a, o: seen.append(a[1].tokens))
        try:
            method(clip)
        finally:
            hook.remove()
    picked = [sorted(tokens.tolist()) for tokens in seen[::2]]
    assert [len(tokens) for tokens in picked] == [18, 18, 4, 4, 4, 4, 4, 18, 4, 4, 4, 4]
    assert len({token for tokens in picked[2:6] for token in tokens}) == 16  # none twice before all had a turn
    assert int(meter.evaluated.sum()) == 2 * sum(map(len, picked))
    assert RAS.at_share(0.5).active == pytest.approx((20 - 8) / 32)


def test_ras_without_starvation_follows_the_spread(clip: Clip) -> None:
    """One partial step: tokens of the widest velocity are computed. As a policy with those groups, through the
    runtime's sampler and its own cache, the run is the same."""
    velocity = guided(clip, clip.noise(), 1.0)[1]
    chosen = velocity[0].std(-1).argsort(descending=True)[:9]
    run = measure(RAS(0.5, 2, 1, (), starvation=0.0), clip)
    assert torch.equal(run.steps == 2, torch.isin(torch.arange(18), chosen))

    class Chosen(HSA):
        def order(self, *arguments: Any) -> Any:
            rest = np.setdiff1d(np.arange(18), chosen.numpy())
            return np.concatenate([rest, np.sort(chosen.numpy())])

    policy = Chosen(((0.5, 2), (0.5, 1)), 1.0, "uniform")
    assert torch.allclose(measure(Allocated(2, policy), clip).rows, run.rows, atol=1e-4)


def test_own_score_is_the_policys(clip: Clip) -> None:
    """By-relative ranks as HSA does; so do the runs end alike, and other scores elsewhere."""
    policy = HSA(((0.5, 12), (0.5, 3)), 0.5)
    expected = measure(Allocated(12, policy), clip)
    assert torch.equal(measure(ByScore(12, policy, "relative"), clip).rows, expected.rows)
    groups = {kind: measure(ByScore(12, policy, kind), clip).steps for kind in ("relative", "change", "magnitude")}
    assert not torch.equal(groups["change"], groups["magnitude"])
    steps = [torch.randn(1, 4, 5) for _ in range(3)]
    change = [sum((b - a).abs()[0, 2]) for a, b in pairwise(steps)]
    size = [sum(b.abs()[0, 2]) for b in steps[1:]]
    assert score(steps, "change")[2] == pytest.approx(float(sum(change)) / 2, rel=1e-5)
    ratios = [float(c / s) for c, s in zip(change, size, strict=True)]
    assert score(steps, "relative")[2] == pytest.approx(sum(ratios) / 2, rel=1e-5)


def test_window_only_over_the_whole_run_is_fewer_steps(clip: Clip) -> None:
    """Every second of 8 steps, held, is plain Euler on 4: the grids are nested."""
    window = Allocated(8, HSA(((1.0, 4),), 1.0, steps=8))
    assert torch.allclose(measure(window, clip).rows, measure(Allocated(4), clip).rows, atol=1e-4)


def test_polynomial_recovers_a_law(clip: Clip) -> None:
    polynomial = fit_polynomial([clip], 12)
    assert len(polynomial) == 5 and np.isfinite(polynomial).all()


# Rows -------------------------------------------------------------------------------------------------------


def test_every_row_can_be_built_and_has_a_kind() -> None:
    rows.check(rows.ALL)
    assert len(set(rows.ALL)) == len(rows.ALL) and set(rows.QUICK) <= set(rows.ALL)
    assert {rows.kind(name) for name in rows.ALL} == set(pictures.STYLES)
    for name in ("hsa-51", "teacache@2", "ras@x", "by-size:hsa-50", "steps-0", "dsa"):
        with pytest.raises(DsaRtError):
            rows.check([name])


def test_shares_of_the_rows_are_those_of_their_groups() -> None:
    tokens = 21 * 16
    for target, names in ((0.75, rows.WINDOW[:2]), (0.5, rows.WINDOW[2:5]), (0.25, rows.WINDOW[5:])):
        for name in names:
            method = rows._method(name, None)
            assert isinstance(method, Allocated) and method.policy is not None
            plan = method.policy.plan(method.steps, tokens, 16)
            assert sum(plan.counts) / (40 * tokens) == pytest.approx(target, abs=rows.NEAR)


def test_methods_travel_to_workers(clip: Clip) -> None:
    """Thresholds included: a worker makes the clip that this process would."""
    names = [name for name in rows.QUICK if "cache" not in name]
    methods = {REGIME: rows.build(names, (), print) | {"teacache@0.5": TeaCache(0.1, (2.0, 0.5)), "easycache@0.5":
               EasyCache(0.2)}}  # fmt: skip
    assert pickle.loads(pickle.dumps(methods)) == methods


def test_bisection_meets_the_share(clip: Clip) -> None:
    for make in (lambda t: TeaCache(t, (1.0, 0.0), 40), lambda t: EasyCache(t, 4, 40)):
        method, share = rows.bisect(make, [clip], 0.5)
        assert share == pytest.approx(measure(method, clip).share) == pytest.approx(0.5, abs=0.05)


# Tables -----------------------------------------------------------------------------------------------------


def entry(name: str, share: float, time: float, psnr: float) -> dict[str, Any]:
    return {"kind": rows.kind(name), "clips": 1, "share": share, "time": time, "seconds": 2 * time, "psnr": psnr,
            "mse": 1.0, "ssim": 0.9, "latent_psnr": psnr, "score": 0.5}  # fmt: skip


def test_gain_is_against_equal_time() -> None:
    """hsa-50 takes the time of 22 steps, so that is what it must beat: 20 steps have 30 dB and 24 steps 34 dB."""
    table = {
        "dense": entry("dense", 1, 1, math.inf), "steps-24": entry("steps-24", 0.6, 0.6, 34),
        "steps-20": entry("steps-20", 0.5, 0.5, 30), "hsa-50": entry("hsa-50", 0.496, 0.55, 33),
        "hsa-50:update=extrapolated": entry("hsa-50:update=extrapolated", 0.496, 0.55, 33.5),
        "ras@0.5": entry("ras@0.5", 0.5, 0.52, 31),
    }  # fmt: skip
    quality.add_gains(table)
    assert table["hsa-50"]["over_fewer_steps"] == pytest.approx(1.0)
    assert table["dense"]["over_fewer_steps"] is None
    (good, first), (lead, second) = quality.verdicts(table)
    assert good and "+1.00 dB" in first
    assert not lead and "+0.50 dB over hsa-50 (no slower)" in second
    table["hsa-50:update=extrapolated"]["psnr"] = 34.5
    assert quality.verdicts(table)[1][0]
    table["steps-20"]["psnr"] = 40
    quality.add_gains(table)
    assert [met for met, _ in quality.verdicts(table)] == [False, False]
    lines = quality.report(table).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "dense", "steps-20", "hsa-50:update=extrapolated", "hsa-50", "ras@0.5", "steps-24",
    ]  # fmt: skip


def test_latent_psnr() -> None:
    reference = torch.tensor([[[-1.0, 3.0]]])
    assert latent_psnr(reference + 0.4, reference) == pytest.approx(20.0, abs=1e-3)
    assert latent_psnr(reference, reference) == math.inf


def test_best_strength_is_the_top_of_a_parabola() -> None:
    values = {s: 30 - 8 * (s - 0.6) ** 2 for s in strength.STRENGTHS}
    assert strength.best_strength(values) == pytest.approx(0.6)
    assert strength.best_strength({0.0: 3.0, 0.5: 2.0, 1.0: 1.0}) == 0.0


def test_strength_cells_are_the_rows_they_say() -> None:
    for cell in strength.cells(quick=False):
        method = rows._method(cell.name, None)
        assert isinstance(method, Allocated) and method.policy is not None and method.steps == cell.steps
        assert method.policy.groups[-1][1] * cell.gap == cell.steps
        assert set(method.policy.strengths(cell.steps)) == {cell.strength}


# Speed ------------------------------------------------------------------------------------------------------


def test_time_by_steps_adds_up() -> None:
    """A machine in which a step takes 10 ms and 1 ms a token."""
    tokens, plans = 100, {}
    for name, policy in (("dense", None), ("hsa", HSA(((0.25, 8), (0.75, 2)), 0.5, selection="random"))):
        plans[name] = speed.plan_of(_sized(tokens), policy)
    by_kind: dict[str, dict[str, list[float]]] = {}
    for name, plan in plans.items():
        by_kind[name] = {}
        for kind, count in zip(speed.kinds(plan), plan.counts, strict=True):
            by_kind[name].setdefault(kind, []).append(0.010 + 0.001 * count)
    made = speed.summarise(plans, {"dense": [4.4, 4.4], "hsa": [1.1, 2.2]}, by_kind)["hsa"]
    counts = [100, 100, 25, 25, 100, 25, 100, 100]
    assert made["token_steps"] == pytest.approx(sum(counts) / 4000)
    assert made["time_by_steps"] == pytest.approx(sum(10 + c for c in counts) / 4400)
    assert made["time_of_runs"] == pytest.approx(0.375)
    assert {kind: step["steps"] for kind, step in made["steps"].items()} == {"all": 3, "all, kept": 2, "25 tokens": 3}


def _sized(tokens: int) -> Any:
    class Sized:
        grid = TokenGrid(1, tokens)

    Sized.tokens = tokens  # type: ignore[attr-defined]
    return Sized


# Programs ---------------------------------------------------------------------------------------------------


def read(folder: Path, name: str) -> dict[str, Any]:
    result = json.loads((folder / name).read_text())
    for key in ("program", "date", "machine", "versions", "settings", "warm_up", "included"):
        assert result[key], key
    return result


def test_quality(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--bundle", str(bundle), "--prompts", "1", "--workers", "0", "--threads", "1", "--timing-clips", "1",
          "--rows", "steps-20 hsa-50 ras@0.5", "--out", str(tmp_path), "--quiet"])  # fmt: skip
    tables = read(tmp_path, "hsa-quality.json")["regimes"]
    assert list(tables) == ["guidance 6, shift 8", "guidance 2.5, shift 5 (its own)"]
    for table in tables.values():
        assert list(table) == ["dense", "steps-20", "hsa-50", "ras@0.5"]
        assert table["dense"]["psnr"] is None and table["dense"]["mse"] == 0 and table["dense"]["time"] == 1
        assert table["steps-20"]["share"] == 0.5 and table["hsa-50"]["share"] == pytest.approx(0.496, abs=0.004)
        assert 0 < table["hsa-50"]["ssim"] < 1
    for name in ("hsa-curve.png", "hsa-map.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "over fewer steps" in capsys.readouterr().out


def test_strength(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--strength", "--quick", "--bundle", str(bundle), "--workers", "0", "--threads", "1", "--out",
                 str(tmp_path), "--quiet"])  # fmt: skip
    assert code == 0 and "hsa-50-like, 40 steps, gap 4" in capsys.readouterr().out
    lines = read(tmp_path, "hsa-strength.json")["regimes"]["guidance 6, shift 8"]
    assert len(lines) == 6 and len({line["psnr"] for line in lines}) == 6


def test_speed(tmp_path: Path) -> None:
    main(["--speed", "--quick", "--threads", "1", "--rounds", "1", "--samples", "2", "--dtypes", "fp32 bf16", "--out",
          str(tmp_path), "--quiet"])  # fmt: skip
    result = read(tmp_path, "hsa-speed.json")
    assert result["difference_to_diffusers"] < 1e-3 and list(result["dtypes"]) == ["fp32", "bf16"]
    for made in result["dtypes"].values():
        shares = {name: round(row["token_steps"], 2) for name, row in made["policies"].items()}
        assert shares == {"dense": 1.0, "hsa-75a": 0.75, "hsa-75b": 0.75, "hsa-50": 0.5, "hsa-25": 0.25}
        assert all(ms["median"] > 0 for ms in made["forward"]["ms"].values())


def test_storage(bundle: Path, tmp_path: Path) -> None:
    main(["--storage", "--quick", "--bundle", str(bundle), "--prompts", "1", "--threads", "1", "--out", str(tmp_path),
          "--quiet"])  # fmt: skip
    result = read(tmp_path, "hsa-storage.json")
    for policies in result["psnr"].values():
        row = policies["hsa-50"]
        assert row["host"] == {"frames": None, "latents": None}  # the same bits
        assert all(20 < decibels < 100 for decibels in row["fp8"].values())
    (run,) = result["memory"]
    assert run["storage"] == "fp8" and run["before"] > 20 and run["whole_as_it_comes"] > 0
    assert run["whole"] > 0 and run["before"] > 50
