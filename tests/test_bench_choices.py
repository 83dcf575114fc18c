"""python -m bench.choices: from results of bench.gpu.ops, here made up, to the table that decides."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_rt.errors import OptionError
from dsa_rt.ops import attention, backend, choices, norm, pool, rope, rows, step
from dsa_rt.ops.choices import Row

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "choices.py").exists():
    pytest.skip("no source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import choices as program  # noqa: E402
from bench.gpu import cases  # noqa: E402

Times = dict[str, float]


def measured(
    op: str, active: int, times: Times, cached: int = 32760, spread: float = 0.02, **more: Any
) -> dict[str, Any]:
    """A row as bench.gpu.ops writes it; times: medians in µs."""
    ways = {
        name: {"cold": {"median": t, "p20": t * (1 - spread), "p80": t * (1 + spread)}} for name, t in times.items()
    }
    backends = [name for name in times if "sdpa" not in name]
    row = {"op": op, "active": active, "cached": cached, "dim": 128, "dtype": "bfloat16", "backends": backends,
           "differs": "", "failed": {}, "refused": {}, "ways": ways}  # fmt: skip
    return row | more


def result(*made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "program": "bench.gpu.ops", "date": "2026-11-21T10:00:00+00:00", "commit": "abc",
        "settings": {"device": "cuda"}, "card": {"name": "NVIDIA H100", "compute_cap": "9.0"},
        "machine": {"cpu": "Zen"}, "rows": list(made),
    } | more  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the program on results beside a table that is in force; returns the rows it writes."""
    present = tmp_path / "present.json"
    present.write_text('{"rows": [\n]}\n')
    monkeypatch.setattr(choices, "PATH", present)

    def go(*results: dict[str, Any], out: Path | None = None) -> list[Row]:
        paths = []
        for number, one in enumerate(results):
            paths.append(tmp_path / f"result-{number}.json")
            paths[-1].write_text(json.dumps(one))
        target = out or tmp_path / "out" / "table.json"
        assert program.main([*map(str, paths), "--out", str(target)]) == 0
        return choices.read(target, backend.MOVABLE)

    return go


def test_the_fastest_of_each_size(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Neighbours with one winner share a row; it tells the smallest lead."""
    table = run(result(
        measured("active_attention", 1408, {"native": 100, "cudnn": 112, "triton": 150, "torch": 1, "sdpa": 1}),
        measured("active_attention", 4680, {"native": 300, "cudnn": 400, "flash": 309, "triton": 500}, spread=0.001),
        measured("active_attention", 8190, {"native": 600, "cudnn": 500, "flash": 700}),
        measured("active_attention", 32760, {"native": 2600, "cudnn": 2000, "flash": 2500}),
    ))  # fmt: skip
    first, second = table
    assert (first.backend, first.next, first.ratio) == ("native", "flash", 1.03)
    assert first.active == (704, 6191) and second.active == (6192, 65520)  # √(4680 · 8190) = 6191.0…; half, double
    assert (second.backend, second.next, second.ratio) == ("cudnn", "native", 1.2)
    for row in table:
        assert row.cached == (16380, 65520) and row.dim == (128, 128) and row.op == "active_attention"
        assert (row.device, row.dtype, row.date) == ("9.0", "bfloat16", "2026-11-21")
        assert (row.machine, row.commit, row.source) == ("NVIDIA H100", "abc", "result-0.json")
    said = capsys.readouterr().out
    assert "+ active_attention on 9.0, bfloat16, A 6192 to 65520, N 16380 to 65520, dim 128: cudnn, measured: " in said
    assert "written: " in said and ", 2 rows" in said


def test_sizes_of_the_cache(run: Any) -> None:
    """A row for each number of cached rows, joined where they say the same."""
    def at(cached: int, *winners: str) -> list[dict[str, Any]]:
        return [
            measured("gather_rows", active, {"native": 20, "triton": 10 if name == "triton" else 30}, cached)
            for active, name in zip((100, 400), winners, strict=True)
        ]  # fmt: skip

    table = run(result(*at(1000, "native", "triton"), *at(4000, "native", "native"), *at(16000, "native", "native")))
    found = {(row.active, row.cached): (row.backend, row.ratio) for row in table}
    assert found == {
        ((50, 200), (500, 2000)): ("native", 1.5), ((201, 800), (500, 2000)): ("triton", 2.0),
        ((50, 800), (2001, 32000)): ("native", 1.5),
    }  # fmt: skip
    for cached in range(500, 32001, 700):  # every size inside has one row
        for active in range(50, 801, 30):
            call = (torch.empty(1, active, 128, device="meta"), torch.empty(1, cached, 128, device="meta"), None)
            assert sum(row.covers(call) for row in table) == 1


def test_what_cannot_be_told_apart_has_no_row(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (100, 200, 400)
    table = run(result(*(
        measured("rms_norm", n, {"native": 10, "triton": 10.3 if n == 200 else 12}) for n in sizes
    )))  # fmt: skip
    assert [row.active for row in table] == [(50, 141), (283, 800)] and all(row.cached is None for row in table)
    assert "left out: rms_norm, A 200 on 9.0: native and triton cannot be told apart" in capsys.readouterr().out


def test_what_is_left_out(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One backend alone, an order that is fixed, a CPU."""
    table = run(
        result(measured("renoise", 9, {"native": 1, "torch": 2}),
               measured("exit_decision", 1408, {"native": 2, "triton": 3}, dtype="float32")),
        result(measured("renoise", 9, {"native": 1, "triton": 2}), settings={"device": "cpu"}),
    )  # fmt: skip
    (row,) = table
    assert (row.op, row.active, row.cached, row.dim, row.dtype) == ("exit_decision", None, None, None, "float32")
    said = capsys.readouterr().out
    assert "left out: renoise, A 9 on 9.0: only native measured of native, triton" in said
    assert "left out: renoise, A 9 on cpu: its order is fixed" in said


def test_new_measurements_replace_rows_of_the_same_calls(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def norm(op: str, faster: str, **more: Any) -> dict[str, Any]:
        times = {"native": 10.0, "triton": 10.0} | {faster: 5.0}
        return measured(op, 100, times, **more)

    present = tmp_path / "present.json"
    before = run(result(norm("rms_norm", "native"), norm("norm_modulate", "native")), out=present)
    after = run(result(norm("rms_norm", "triton")))
    assert [(row.op, row.backend) for row in before] == [("norm_modulate", "native"), ("rms_norm", "native")]
    assert [(row.op, row.backend) for row in after] == [("norm_modulate", "native"), ("rms_norm", "triton")]
    said = capsys.readouterr().out
    assert "- rms_norm on 9.0, bfloat16, A 50 to 200, dim 128: native" in said
    assert "+ rms_norm on 9.0, bfloat16, A 50 to 200, dim 128: triton, measured: 2.00 times as fast as native" in said
    assert choices.read(present, backend.MOVABLE) == before  # only --out was written
    assert len(run(result(norm("rms_norm", "triton", dim=64)))) == 3
    run(result())
    assert "nothing changes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (result(measured("rms_norm", 9, {"native": 1}), measured("renoise", 5, {}, differs="triton differs from the")),
         "result-0.json has a wrong row, renoise, A 5: triton differs from the; nothing is taken from it"),
        (result(measured("active_attention", 9, {"native": 1}, failed={"cudnn": "RuntimeError: no plan"})),
         "has a wrong row, active_attention, A 9, N 32760: cudnn failed: RuntimeError: no plan"),
        (result(program="bench.ops"), "is no result of bench.gpu.ops"),
        (result(commit=None), "is no result of bench.gpu.ops that names its commit"),
        (result({"op": "rms_norm", "active": 5}), "does not say which backends were checked"),
        (result(*2 * [measured("rms_norm", 9, {"native": 1, "triton": 2})]), "A 9, N None was measured twice"),
    ],
)  # fmt: skip
def test_results_that_are_refused(spoilt: dict[str, Any], says: str, run: Any, tmp_path: Path) -> None:
    """Nothing is written."""
    with pytest.raises(OptionError) as caught:
        run(spoilt)
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read(run: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none.json cannot be read"):
        program.main([str(tmp_path / "none.json")])


def test_the_benchmark_has_the_definition_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "QUERIES", 3)
    sizes = cases.Sizes(8, cached=23, heads=3, dim=10, dtype=torch.float32)
    inputs = cases.OPS["active_attention"].make(sizes, torch.device("cpu"))
    assert inputs.expected is not None
    inputs.call("torch")
    assert (inputs.expected()[0] - inputs.outputs[0]).abs().max() < 1e-6


def test_the_benchmark_names_sizes_as_the_table_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bench.gpu.cases says of a call is what the runtime will see of it."""
    seen: list[tuple[str, str, dict[str, int]]] = []

    def served(op: str, _: str | None, decides: torch.Tensor, tensors: tuple[Any, ...], *others: Any) -> bool:
        call = (*tensors, *others)
        named = choices.SIZES.get(op, {})
        sizes = {name: call[argument].shape[axis] for name, (argument, axis) in named.items()}
        seen.append((op, str(decides.dtype).removeprefix("torch."), sizes))
        return True

    for module in (attention, norm, pool, rope, rows, step):
        monkeypatch.setattr(module, "served", served)
    sizes = cases.Sizes(7, cached=23, heads=3, dim=10, latent=12, frames=2)
    for op, case in cases.OPS.items():
        case.make(sizes, torch.device("cpu")).call("native")
        whole = {"active": 7, "cached": 23, "dim": case.dim(sizes)}
        assert seen.pop() == (op, case.dtype(sizes), {name: whole[name] for name in choices.SIZES.get(op, {})})
    assert set(cases.OPS) == {*choices.SIZES, "active_attention_fp8"}
