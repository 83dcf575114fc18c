"""The command line: exit codes, one line per error, JSON, and what is left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_rt.bundle import Schedule, Size
from dsa_rt.cli import main
from dsa_rt.codec.conv import ConvCodec, ConvCodecConfig
from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.demo.grammar import MAX_WORDS, VOCABULARY
from dsa_rt.exporting import export
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.progress import Event, caption, progress
from dsa_rt.stats import Stats, frames_sha256

PROMPT = "a red square bouncing, a blue circle at rest"
COMMAND = [sys.executable, "-m", "dsa_rt.cli"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A streaming bundle with random weights: 32x32 pixels, 21 frames in two chunks, four passes, a head."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", causal=True)


@pytest.fixture(scope="module")
def many_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "many", causal=False)


def make_bundle(path: Path, causal: bool) -> Path:
    torch.manual_seed(0)
    form = "causal" if causal else "bidirectional"
    config = WanConfig(32, 64, 2, 2, 4, 4, 16, MAX_WORDS, freq_dim=16, form=form)
    codec = ConvCodec(ConvCodecConfig(4, 8, 8, 1, 1, 1, 1))
    text = GrammarTextEncoder(GrammarTextConfig(len(VOCABULARY), MAX_WORDS, 16, 2, 1))
    export(
        path,
        name="tiny",
        model=WanModel(config),
        codec=codec,
        text_encoder=text,
        schedule=Schedule(5.0, (1000.0, 750.0, 500.0, 250.0) if causal else 3),
        size=Size(32, 32, 21),
        head=ConfidenceHead(ConfidenceConfig(32, 2, 64, (0, 1))) if causal else None,
        chunk_frames=3 if causal else None,
    )
    return path


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


Program = Callable[..., Ran]


@pytest.fixture
def dsa_rt(capfd: pytest.CaptureFixture[str]) -> Program:
    """Runs a command line in this process, which is many times faster than a new one."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        code = main([str(argument) for argument in arguments])
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        return Ran(code, *capfd.readouterr())

    return run


def refused(ran: Ran, code: int, *words: str) -> None:
    """The exit code, nothing on stdout, and exactly one line on stderr that holds the words."""
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ""
    assert ran.stderr.startswith("dsa-rt: error: ") and ran.stderr.count("\n") == 1, ran.stderr
    for word in words:
        assert word in ran.stderr


def test_help_is_fast_and_complete(dsa_rt: Program) -> None:
    code = (
        "import sys\nfrom dsa_rt.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'av', 'PIL', 'matplotlib', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(code or bool(heavy))"
    )
    for arguments in (["--help"], ["generate", "--help"], ["doctor", "--help"], ["--version"]):
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
    shown = dsa_rt("generate", "--help").stdout
    for word in ("--out", "--policy", "--seed", "--memory-limit", "--traceback", "exit codes:", "130"):
        assert word in shown


def test_generate_writes_what_was_made(dsa_rt: Program, bundle: Path, tmp_path: Path) -> None:
    files = {"out": tmp_path / "clip.npy", "stats": tmp_path / "s.json", "chart": tmp_path / "c.png"}
    options = [item for name, path in files.items() for item in (f"--{name}", path)]
    ran = dsa_rt("generate", PROMPT, "--bundle", bundle, "--seed", 5, "--policy", "dsa-paper", *options)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith("planned memory: ") and "\r" not in ran.stderr  # no bar outside a terminal
    stats = Stats.from_dict(json.loads(files["stats"].read_text()))
    frames = np.load(files["out"])
    assert frames.shape == (21, 32, 32, 3) and frames.dtype == np.uint8
    assert stats.frames_sha256 == frames_sha256(torch.from_numpy(frames))
    assert (stats.seed, stats.prompt, stats.policy, stats.frames) == (5, PROMPT, "dsa-paper", 21)
    assert stats.chunks[0].passes == 4 and stats.chunks[0].first_confidence is not None
    assert (
        f"model calls        {stats.model_calls} of 9" in ran.stdout
        and "21 frames of 32x32, 1.31 s at 16 fps" in ran.stdout
    )
    assert files["chart"].read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["c.png", "clip.npy", "s.json"]


def test_json_is_one_object_and_one_seed_gives_one_result(
    dsa_rt: Program, bundle: Path, tmp_path: Path
) -> None:
    records = []
    for seed in (1, 1, 2):
        ran = dsa_rt("generate", PROMPT, "--bundle", bundle, "--seed", seed, "--json", "--policy", "fixed-2")
        assert ran.returncode == 0 and ran.stderr == ""
        records.append(json.loads(ran.stdout))
    assert ran.stdout.count("\n") == 1
    hashes = [record["stats"]["frames_sha256"] for record in records]
    assert hashes[0] == hashes[1] != hashes[2]
    assert set(records[0]["excluded_ms"]) == {"load", "compile", "write"}
    assert records[0]["stats"]["model_calls"] == 5  # none after the last chunk
    ran = dsa_rt(
        "generate",
        PROMPT,
        "--bundle",
        bundle,
        "--seed",
        1,
        "--quiet",
        "--policy",
        "fixed-2",
        "--out",
        tmp_path / "f",
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    image = pytest.importorskip("PIL.Image")
    frames = [np.asarray(image.open(path)) for path in sorted((tmp_path / "f").iterdir())]
    assert frames_sha256(torch.from_numpy(np.stack(frames))) == hashes[0]


def test_options_reach_the_run(dsa_rt: Program, bundle: Path, many_step: Path, tmp_path: Path) -> None:
    ran = dsa_rt(
        "generate", PROMPT, "--bundle", bundle, "--json", "--frames", 45, "--height", 48, "--width", 16,
        "--window", 6, "--sink", 3, "--dtype", "fp32", "--policy", "fixed-1", "--memory-limit", "1GB",
    )  # fmt: skip
    stats = json.loads(ran.stdout)["stats"]
    assert (stats["frames"], stats["height"], stats["width"], stats["dtype"]) == (45, 48, 16, "float32")
    assert (stats["settings"]["window"], stats["settings"]["sink"], stats["passes"]) == (6, 3, 4)
    ran = dsa_rt("generate", PROMPT, "--bundle", many_step, "--json", "--steps", 5, "--guidance-scale", 2)
    stats = json.loads(ran.stdout)["stats"]
    assert (stats["passes"], stats["model_calls"], stats["settings"]["guidance"]) == (5, 10, 2.0)


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, ["COMMAND"]),
        (["generat"], 2, ["'generat'", "generate"]),
        (["generate", "--out", "a.mp4"], 2, ["prompt"]),
        (["generate", PROMPT], 2, ["--out"]),
        (["generate", PROMPT, "--out", "a.mp4", "--colour", "1"], 2, ["--colour"]),
        (["generate", PROMPT, "--out", "a.mp4", "--frames", "many"], 2, ["--frames", "'many'"]),
        (["generate", PROMPT, "--out", "a.mp4", "--frame", "9"], 2, ["--frame"]),
        (["generate", PROMPT, "--out", "a.mp4", "--scale", "0"], 2, ["--scale is 0"]),
        (["generate", PROMPT, "--out", "a.mp4", "--dtype", "int8"], 2, ["int8", "bf16"]),
        (["generate", PROMPT, "--out", "a.png", "--chart", "./a.png"], 2, ["same file"]),
        (["generate", PROMPT, "--out", "a.avi"], 4, ["a.avi", ".mp4"]),
        (["generate", PROMPT, "--out", "no/a.mp4"], 4, ["no folder", "'no'"]),
        (["generate", PROMPT, "--out", "a.mp4", "--stats", "s.txt"], 4, ["s.txt", ".json"]),
        (["generate", PROMPT, "--out", "a.mp4", "--chart", "c.bmp"], 4, ["c.bmp", ".svg"]),
        (["generate", PROMPT, "--out", "a.png", "--frames", "21"], 4, ["21 frames", "a-%04d.png"]),
        (["generate", PROMPT, "--out", "a.mp4", "--bundle", "nowhere"], 3, ["nowhere"]),
        (["inspect", "nowhere"], 3, ["nowhere"]),
    ],
)
def test_mistakes_that_need_no_bundle(
    dsa_rt: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(dsa_rt(*arguments), code, *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--policy", "fast"], 2, ["'fast'", "dense"]),
        (["--policy", "fixed-9"], 2, ["9", "4"]),
        (["--height", "40"], 2, ["height 40", "32 or 48"]),
        (["--width", "-16"], 2, ["width", "-16"]),
        (["--frames", "20"], 2, ["20", "9 or 21"]),
        (["--frames", "0"], 2, ["frames is 0"]),
        (["--window", "2"], 2, ["window 2"]),
        (["--steps", "9"], 2, ["steps=9"]),
        (["--guidance-scale", "3"], 2, ["guidance_scale=3"]),
        (["--seed", str(2**80)], 2, [str(2**80)]),
        (["--device", "tpu"], 2, ["tpu"]),
        (["--device", "cuda:99"], 2, ["cuda:99"]),
        (["--memory-limit", "plenty"], 2, ["plenty", "2GB"]),
        (["--memory-limit", "1KB"], 5, ["memory limit", "lowers it"]),
        (["--out", "a.png"], 4, ["21 frames"]),
    ],
)
def test_mistakes_the_runtime_finds(
    dsa_rt: Program,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        dsa_rt("generate", PROMPT, "--bundle", bundle, "--json", "--out", "a.mp4", *arguments), code, *words
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "prompt, word",
    [
        ("a pink square bouncing", "For example"),
        ("a red square bouncing " * 30, "a red square"),
        ("a red circle spinning", "spinning circle"),
        (PROMPT + ", a green square drifting", "one or two"),
        ("\x1b[31mred\nsquare", "For example"),
    ],
)
def test_prompts_outside_the_grammar_say_what_is_understood(
    dsa_rt: Program, bundle: Path, tmp_path: Path, prompt: str, word: str
) -> None:
    ran = dsa_rt("generate", prompt, "--bundle", bundle, "--out", tmp_path / "a.mp4", "--quiet")
    refused(ran, 2, word)
    assert "\x1b" not in ran.stderr
    assert os.listdir(tmp_path) == []


def test_traceback_only_when_asked_for(dsa_rt: Program, bundle: Path) -> None:
    arguments = ["generate", PROMPT, "--bundle", bundle, "--json", "--policy", "fast"]
    assert "Traceback" not in dsa_rt(*arguments).stderr
    ran = dsa_rt(*arguments, "--traceback")
    assert ran.returncode == 2 and "Traceback" in ran.stderr and "PolicyError" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("dsa-rt: error: ")


def test_damaged_bundles_are_exit_code_3(dsa_rt: Program, bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    weights = copy / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(dsa_rt("inspect", copy, "--json"), 3, "generator.safetensors")
    refused(dsa_rt("generate", PROMPT, "--bundle", copy, "--json"), 3, "generator.safetensors")


def test_inspect_doctor_and_prompts(dsa_rt: Program, bundle: Path) -> None:
    record = json.loads(dsa_rt("inspect", bundle, "--json").stdout)
    assert record["name"] == "tiny" and record["components"]["generator"]["tensors"] > 10
    assert "tiny" in dsa_rt("inspect", bundle).stdout
    record = json.loads(dsa_rt("doctor", "--json").stdout)
    assert record["torch"]["version"] == torch.__version__
    assert record["cuda"]["available"] == torch.cuda.is_available() and (
        record["cuda"]["why"] or torch.cuda.is_available()
    )
    assert record["backends"]["cpu float32"]["renoise"]["backend"] in ("native", "torch")
    shown = dsa_rt("doctor").stdout
    assert torch.__version__ in shown and "renoise" in shown and "native module" in shown
    record = json.loads(dsa_rt("prompts", "--json").stdout)
    assert "purple" in record["colours"]
    from dsa_rt.demo.grammar import parse

    for example in record["examples"]:
        parse(example)
        assert example in dsa_rt("prompts").stdout


# Signals ----

# The program with something planted in it that says on stderr where it is and then takes its time, or fails.
PLANTED = """
import sys, time, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
def pause(*_, **__):
    print("here", file=sys.stderr, flush=True)
    time.sleep(60)
{plant}
from dsa_rt.cli import main
sys.exit(main())
"""
PLANTS = {
    "importing": "import dsa_rt.commands\ndsa_rt.commands.load_modules = pause",
    "loading": "import dsa_rt.runtime\ndsa_rt.runtime.load = pause",
    "compiling": "from dsa_rt.generate import Generate\nGenerate.warm_up = pause",
    "denoising": "from dsa_rt.engine import Engine\nEngine.run = pause",
    "encoding": "from dsa_rt.media import Mp4Writer\nMp4Writer._mux = pause",
    "charting": "import dsa_rt.chart\ndsa_rt.chart.draw = pause",
    "disguised": (
        "import dsa_rt.runtime\n"
        "def hide(*_, **__):\n"
        "    try:\n        pause()\n"
        "    except KeyboardInterrupt:\n        raise ImportError('cannot load')\n"
        "dsa_rt.runtime.load = hide"
    ),
}


def planted(plant: str, *arguments: object, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", PLANTED.format(plant=plant), *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "place, number", [*((place, signal.SIGINT) for place in PLANTS), ("denoising", signal.SIGTERM)]
)
def test_signals_at_any_time(bundle: Path, tmp_path: Path, place: str, number: int) -> None:
    code, word = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}[
        signal.Signals(number)
    ]
    (tmp_path / "a.mp4").write_text("old")
    arguments = ["generate", PROMPT, "--bundle", bundle, "--quiet", "--out", "a.mp4", "--chart", "c.png"]
    with planted(PLANTS[place], *arguments, folder=tmp_path) as program:
        assert program.stderr is not None
        assert program.stderr.readline() == "here\n"
        program.send_signal(number)
        output, errors = program.communicate(timeout=300)
    assert program.returncode == code
    assert output == "" and errors.startswith(f"dsa-rt: {word}") and errors.count("\n") == 1, errors
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert ((tmp_path / "a.mp4").read_text(errors="replace") == "old") == (place != "charting")


def test_unexpected_errors_are_one_line_too(tmp_path: Path) -> None:
    plant = """
import dsa_rt.runtime
def load(*_, **__):
    raise ZeroDivisionError("line\\nbreak")
dsa_rt.runtime.load = load
"""
    with planted(plant, "generate", PROMPT, "--json", folder=tmp_path) as program:
        output, errors = program.communicate(timeout=300)
    assert (program.returncode, output) == (1, "")
    assert errors == "dsa-rt: error: unexpected ZeroDivisionError: line break (--traceback shows where)\n"


def test_running_out_of_memory_is_exit_code_5(tmp_path: Path) -> None:
    plant = "import dsa_rt.runtime, torch\ndsa_rt.runtime.load = lambda *_, **__: torch.empty(2**60)"
    with planted(plant, "generate", PROMPT, "--json", folder=tmp_path) as program:
        output, errors = program.communicate(timeout=300)
    assert (program.returncode, output) == (5, "")
    assert "out of memory" in errors and errors.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["doctor", "--json"], ["prompts"]])
def test_a_stdout_that_cannot_be_written(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode == 4
    assert ran.stderr.startswith("dsa-rt: error: ") and ran.stderr.count("\n") == 1, ran.stderr


# Progress ----


def test_the_bar_shows_on_a_terminal_and_leaves_no_trace(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "generate", PROMPT, "--bundle", str(bundle), "--out", "a.npy", "--frames", "93"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=follower,
    ) as program:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        output = program.stdout.read() if program.stdout else b""
    os.close(leader)
    text = shown.decode()
    assert program.returncode == 0 and b"model calls" in output and output.isascii()
    assert "loading" in text and "chunk 8/8" in text and "%" in text
    assert text.replace("\r\n", "\n").splitlines()[-1].split("\r")[-1].strip() == ""


@pytest.mark.parametrize("passes", [[4, 1, 3], [1], [50]])
def test_progress_never_goes_back_and_ends_at_the_end(passes: list[int]) -> None:
    most = max(4, *passes)
    events = [Event("text", 0, len(passes), passes_scheduled=most)]
    for chunk, spent in enumerate(passes):
        events += [Event("pass", chunk, len(passes), done + 1, 0.5, 0.1, most) for done in range(spent)]
        events += [
            Event(kind, chunk, len(passes), spent, None, 0.2, most) for kind in ("context", "decode", "chunk")
        ]
    done = [progress(event)[0] for event in events]
    assert done == sorted(done) and done[0] == 0
    assert progress(events[-1]) == (len(passes) * most, len(passes) * most)
    assert caption(events[1]) == f"chunk 1/{len(passes)}, pass 1, confidence 0.50"


def test_progress_of_a_session_without_end() -> None:
    assert progress(Event("chunk", 7, None, 2, passes_scheduled=4)) == (32, None)
    assert caption(Event("chunk", 7, None, 2)) == "chunk 8, done"
