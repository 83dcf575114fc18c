"""bench/gpu.sh with stand-ins for the tools of a GPU machine, and its Python programs on the CPU at tiny sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from dsa_rt.ops.backend import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists() or not shutil.which("bash"), reason="no source tree or no bash")
CLEAN = """case "$*" in
  *racecheck*) echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)' ;;
  *) echo '========= ERROR SUMMARY: 0 errors' ;;
esac
"""


class Tools:
    """A folder of programs that shadow the real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder / "tools", folder / "out"
        self.folder.mkdir()
        for needed in ("bash", "dirname", "basename", "mkdir", "tee", "tail", "head", "cat", "grep", "sed", "tar",
                       "gzip", "date", "timeout", "uname", "nproc", "sort", "env", "git"):  # fmt: skip
            (self.folder / needed).symlink_to(str(shutil.which(needed)))
        self.add("fake-python", "echo 'sanitize: 7 calls ran'")

    def add(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(self, *stages: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.folder), "PYTHON": "fake-python", "COMMIT": "abc", "HOME": os.environ["HOME"]}
        return subprocess.run(
            ["bash", str(SCRIPT), str(self.out), *stages], env=environment, capture_output=True, text=True, timeout=60
        )

    def summary(self) -> str:
        return (self.out / "summary.txt").read_text()


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


def test_bad_input(tools: Tools) -> None:
    assert tools.run("tests").returncode == 2
    assert "unknown stage: tests" in tools.run("tests").stderr
    assert subprocess.run(["bash", str(SCRIPT)], capture_output=True).returncode == 2


def test_sanitizer_that_is_missing(tools: Tools) -> None:
    done = tools.run("sanitize")
    assert done.returncode == 1 and "sanitize  FAILED with 1" in tools.summary()
    assert "compute-sanitizer is not installed" in done.stdout


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('"${@: -3}"', "memcheck: no clean summary"),
        ('"${@: -3}"; echo "== ERROR SUMMARY: 2 errors"', "memcheck: no clean summary: == ERROR SUMMARY: 2"),
        (f'"${{@: -3}}"; {CLEAN} exit 9', "memcheck: exit status 9"),
        (CLEAN, "racecheck: the ops did not run"),
    ],
)
def test_sanitizer_that_finds_something_or_nothing(tools: Tools, body: str, says: str) -> None:
    tools.add("compute-sanitizer", body)
    done = tools.run("sanitize")
    assert done.returncode == 1 and says in done.stdout


def test_clean_run_and_what_is_sent_back(tools: Tools) -> None:
    tools.add("compute-sanitizer", f'"${{@: -3}}"; {CLEAN}')
    done = tools.run("sanitize", "ops", "layer", "choices")
    assert done.returncode == 0, done.stdout + done.stderr
    assert tools.summary().count("passed") == 4 and "commit abc" in tools.summary()
    with tarfile.open(f"{tools.out}.tar.gz") as archive:
        names = archive.getnames()
    assert {"out/summary.txt", "out/sanitize-racecheck.log", "out/ops.log"} <= set(names)


def test_a_stage_that_fails_does_not_stop_the_next(tools: Tools) -> None:
    tools.add("fake-python", "exit 3")
    done = tools.run("machine", "build", "test", "ops", "layer")
    assert done.returncode == 1
    for line in ("machine   FAILED", "build     FAILED with 3", "test      FAILED with 3", "ops       FAILED with 3"):
        assert line in tools.summary()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_op_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu.cases import OPS

    done = run("bench.gpu.sanitize", "--device", "cpu", "--backends", "native", "torch")
    assert done.returncode == 0, done.stdout + done.stderr
    in_fp16 = [op for op, case in OPS.items() if not case.wide]
    more = ["active_attention", "active_attention_fp8"] * 2 + ["residual_norm_modulate", "quantize_rows"]
    unserved = [op for op in in_fp16 + more if IMPLEMENTATIONS[op][0].refusal("cpu", torch.float16)]
    count = 4 * (len(OPS) + len(more)) * 2 - len(unserved)  # sizes, calls, backends; what native does not take in fp16
    assert done.stdout.splitlines()[-1] == f"sanitize: {count} calls ran"


def test_an_op_that_is_never_served_fails() -> None:
    done = run("bench.gpu.sanitize", "--device", "cpu", "--backends", "nothing")
    assert done.returncode == 1 and "NEVER RAN: nothing norm_modulate" in done.stdout


def test_ops(tmp_path: Path) -> None:
    done = run("bench.gpu.ops", "--device", "cpu", "--sizes", "tiny", "--out", str(tmp_path), "--active", "5",
               "--cached", "21", "13", "4", "--commit", "abc")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu-ops.json").read_text())
    assert result["commit"] == "abc" and result["best"]["copy_gb_s"] > 0
    for row in result["rows"]:
        assert row["differs"] == "" and not row["failed"] and row["bytes"] > 0
        assert {"native", "torch"} <= set(row["ways"])
        for way in row["ways"].values():
            assert 0 < way["cold"]["p20"] <= way["cold"]["median"] <= way["cold"]["p80"]
    attention, shorter = (row for row in result["rows"] if row["op"] == "active_attention")
    assert "sdpa" in attention["ways"] and attention["operations"] == 4 * 5 * 21 * 32
    assert (attention["cached"], shorter["cached"], attention["dim"], attention["dtype"]) == (21, 13, 16, "bfloat16")
    assert {"cudnn", "flash", "flash3", "triton"} == set(attention["refused"])
    assert attention["backends"] == ["native", "torch"]
    assert [row["op"] for row in result["rows"]].count("rms_norm") == 1  # no cache, whatever its length
    table = tmp_path / "choices.json"
    done = run("bench.choices", str(tmp_path / "gpu-ops.json"), "--out", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: active_attention, A 5, N 13 on cpu: its order is fixed" in done.stdout
    assert table.read_text() == (ROOT / "dsa_rt" / "ops" / "choices.json").read_text()


def test_one_size_is_measured_in_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu import ops

    monkeypatch.setattr(ops, "ONE_SIZE_OF_FP16", 5)
    arguments = ["--device", "cpu", "--sizes", "tiny", "--ops", "rms_norm", "renoise", "--out", str(tmp_path)]
    assert ops.main(arguments) == 0
    rows = json.loads((tmp_path / "gpu-ops.json").read_text())["rows"]
    assert [(row["op"], row["active"], row["dtype"]) for row in rows] == [
        ("rms_norm", 5, "bfloat16"), ("rms_norm", 13, "bfloat16"), ("renoise", 5, "float32"),
        ("renoise", 13, "float32"), ("rms_norm", 5, "float16"),
    ]  # fmt: skip
    assert ops.label(rows[-1]) == "rms_norm, A 5, fp16" and "torch" in rows[-1]["ways"]


def test_a_wrong_result_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu import ops
    from dsa_rt.ops import norm

    right = norm.norm_modulate

    def wrong(out: torch.Tensor, *arguments: object, backend: str | None = None) -> None:
        right(out, *arguments, backend=backend)  # type: ignore[arg-type]
        if backend == "native":
            out[..., 0] += 1

    monkeypatch.setattr(norm, "norm_modulate", wrong)
    arguments = ["--device", "cpu", "--sizes", "tiny", "--ops", "norm_modulate", "--out", str(tmp_path)]
    assert ops.main(arguments) == 1
    row = json.loads((tmp_path / "gpu-ops.json").read_text())["rows"][0]
    assert row["differs"].startswith("native differs from the definition by ")


def test_layer(tmp_path: Path) -> None:
    done = run("bench.gpu.layer", "--device", "cpu", "--sizes", "tiny", "--out", str(tmp_path), "--active", "9",
               "--cached", "23")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "gpu-layer.json").read_text())["rows"]
    assert row["active"] == 9 and row["floor_us"] > 0 and len(row["parts"]) == 6
