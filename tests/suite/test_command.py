"""``dsa-rt bench`` from the command line, its table and its pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dsa_rt.cli import main
from dsa_rt.suite import command, device, pictures, records
from dsa_rt.suite.cases import CASES
from dsa_rt.suite.report import report
from dsa_rt.suite.schema import read

from .small import SMALL, small


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--json", "1.3b-*", "demo-dsa"]) == 0
    found = {case["name"]: case["refusal"] for case in json.loads(capsys.readouterr().out)["cases"]}
    assert len(found) == 6 and found["demo-dsa"] is None
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(CASES) and lines[2].startswith("| demo-dense")


@pytest.mark.parametrize(
    ("options", "said"),
    [(["nothing-*"], "no case is called 'nothing-*'"), (["--runs", "4"], "--runs is 4; expected 5 or more"),
     (["--threads", "0"], "--threads is 0"), (["--compare", "a"], "expected 2 arguments")],
)  # fmt: skip
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [small("one", policy="scripted:0"), SMALL[4]]
    monkeypatch.setattr(command.known, "select", lambda _: cases)
    monkeypatch.setitem(device.MATMUL, "cpu", 64)
    monkeypatch.setitem(device.COPY, "cpu", 1 << 16)
    assert main(["bench", "--out", str(tmp_path / "out"), "--quick", "--runs", "5", "--quiet"]) == 0
    printed = capsys.readouterr().out
    written = read(tmp_path / "out" / "suite.json")
    assert [case["name"] for case in written["cases"]] == ["one, quick"] and written["settings"]["quick"] is True
    assert "- not run: too-large, quick: it needs a CUDA device, and torch sees none" in printed
    assert "scripted:0 |" in next(line for line in printed.splitlines() if line.startswith("| one, quick (random"))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "suite.json", "throughput.png", "roofline.png", "timeline.png"
    }  # fmt: skip
    for name in ("throughput", "roofline", "timeline"):
        pixels = np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("L"))
        assert pixels.shape[1] > 800 and pixels.std() > 5


def test_table_says_what_was_measured(result: dict[str, Any]) -> None:
    case = result["cases"][1]
    case["figures"]["fps_denoise"] = {"median": 123.45, "p20": 120.0, "p80": 130.0, "n": 5}
    case["between_chunks_ms"] = {"p50": 11.0, "p95": 22.0, "p99": 33.0, "n": 77}
    case["deadlines"] = {"misses": 3, "n": 40}
    text = report(result)
    rows = [line for line in text.splitlines() if line.startswith("| refined (random weights)")]
    assert len(rows) == 3 and "123.5 (120.0-130.0)" in rows[0]
    assert [cell.strip() for cell in rows[1].split("|")][3:8] == ["11.0", "22.0", "33.0", "77", "3 of 40"]
    assert "- not run: wrong: PolicyError" in text and "warm-up: each way is run until" in text
    result["load_before"], result["cases"] = 99.0, []
    assert "the machine was busy (load 99.0" in report(result)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in place of files."""
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure) or path)
    return figures


def test_throughput_draws_the_medians(result: dict[str, Any], drawn: list[Figure], tmp_path: Path) -> None:
    pictures.throughput(result, tmp_path / "a.png")
    panels = drawn[0].axes
    assert [len(panel.patches) for panel in panels] == [9, 3]  # three of the causal generator, one of the other
    order = [case for case in result["cases"] if case["name"] != "many"]
    widths = [patch.get_width() for patch in panels[0].patches]
    parts = ("denoise", "with_decode", "end_to_end")
    assert widths == [case["figures"][f"fps_{part}"]["median"] for case in order for part in parts]
    for panel in panels:
        assert panel.get_xlim()[1] > max(patch.get_width() for patch in panel.patches)


def test_roofline_draws_points_under_roofs(result: dict[str, Any], drawn: list[Figure], tmp_path: Path) -> None:
    pictures.roofline(result, tmp_path / "a.png")
    lines = drawn[0].axes[0].lines
    roofs, points = lines[: len(result["peaks"])], lines[len(result["peaks"]) :]
    (peak,) = result["peaks"].values()
    assert max(roofs[0].get_ydata()) == peak["tflop_s"]
    assert [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points] == [
        (case["roofline"]["flop_per_byte"], case["figures"]["tflop_s"]["median"]) for case in result["cases"]
    ]


def test_timeline_draws_every_pass_where_it_ran(result: dict[str, Any], drawn: list[Figure], tmp_path: Path) -> None:
    events = [("text", 0, 0, 0.1), ("pass", 0, 1, 0.3), ("pass", 0, 2, 0.6), ("context", 0, 2, 0.7),
              ("decode", 0, 2, 1.0), ("chunk", 0, 2, 1.0), ("pass", 1, 1, 1.5), ("decode", 1, 1, 2.6),
              ("chunk", 1, 1, 2.6), ("context", 1, 1, 3.0), ("pass", 2, 1, 3.01)]  # fmt: skip
    result["timeline"] = {"case": "refined", "events": [
        dict(zip(("kind", "chunk", "passes", "seconds"), event, strict=True)) for event in events
    ]}  # fmt: skip
    result["cases"][1]["runs"][0]["chunk_frames"] = [8, 12]
    pictures.timeline(result, tmp_path / "a.png")
    bars = [(p.get_x(), p.get_x() + p.get_width(), round(p.get_y() + 0.375)) for p in drawn[0].axes[0].patches]
    expected = [(0, 100, 0), (100, 300, 0), (300, 600, 0), (600, 700, 0), (700, 1000, 0), (1000, 1500, 1),
                (1500, 2600, 1), (2600, 3000, 1), (2600, 3010, 2)]  # fmt: skip
    assert [pytest.approx(bar) for bar in expected] == bars
    needed = [line.get_xdata()[0] for line in drawn[0].axes[0].lines]
    assert needed == [1000, 1500]  # 8 frames at 16 a second after the first chunk


def test_nothing_to_draw(result: dict[str, Any], drawn: list[Figure], tmp_path: Path) -> None:
    assert len(pictures.draw(result, tmp_path)) == 3
    assert pictures.draw(result | {"cases": [], "timeline": None}, tmp_path) == []


def test_from_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.append(str(Path(__file__).parents[2]))  # bench/ is no part of the package
    from bench import suite

    assert suite.main(["--list", "demo-dsa"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| demo-dsa |")


def test_the_runtime_does_not_import_the_suite() -> None:
    program = "import sys, dsa_rt, dsa_rt.cli, dsa_rt.runtime; print([n for n in sys.modules if 'dsa_rt.suite' in n])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_commit_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not of a repository that happens to hold the environment it is installed in."""
    found = records.commit()
    assert found is None or len(found.removesuffix("+changes")) == 40
    inside = tmp_path / "venv" / "lib"
    inside.mkdir(parents=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *line], check=True)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.commit() is not None
    monkeypatch.setattr(records, "ROOT", inside)
    assert records.commit() is None
