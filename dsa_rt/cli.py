"""The command line: `dsa-rt generate | export | inspect | bench | prompts | doctor | train`.

Results go to stdout, progress and errors to stderr. With --json, stdout gets exactly one JSON object. An
error is one line, `dsa-rt: error: …`; nothing is left half-written. torch is imported inside the commands
only, so that --help and a mistyped option answer at once.

Exit codes: 0 done, 1 unexpected error, 2 bad usage or input, 3 bad bundle, 4 output that cannot be written, 5
not enough memory, 130 Ctrl-C, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import dsa_rt
from dsa_rt import commands
from dsa_rt.errors import BundleError, Cancelled, DsaRtError, MemoryLimitError, OptionError, OutputError
from dsa_rt.interrupts import interruptible, load_modules

EXIT_CODES = """exit codes:
  0  done
  1  unexpected error (--traceback shows where)
  2  bad usage, option, size, policy or prompt
  3  bundle that is missing, damaged or of an unknown version
  4  output that cannot be written
  5  not enough memory
  130  interrupted with Ctrl-C        143  terminated
"""

KV_STORAGES = ("auto", "model", "fp8", "host")
KV_HELP = (
    "where K/V is kept between steps that skip tokens: on the device in the model's dtype, there in 8 bits, or in host "
    "memory; auto: the first that fits"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; arguments default to those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    signals: list[int] = []
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    try:
        with interruptible(signals):
            code = _run(given)
            sys.stdout.flush()  # a full disk or closed pipe behind stdout is an error too
            return code
    except SystemExit as stop:  # argparse: --help and usage errors
        return int(stop.code or 0)
    except BaseException as error:
        if show_traceback:
            import traceback

            traceback.print_exc()
        code, message = _explain(error, signals)
        with contextlib.suppress(OSError):
            print(f"dsa-rt: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            return code
        # stdout cannot be written: or else the interpreter would fail once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return code


def _run(given: list[str]) -> int:
    if given[:1] == ["train"]:  # has its own options
        load_modules("torch")
        from dsa_rt.train.__main__ import main as train

        return train(given[1:]) or 0
    options = _parser().parse_args(given)
    if not options.json:
        return _exit_code(options.run(options))
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints, stdout stays one object
        record = options.run(options)
    print(json.dumps(record, allow_nan=False))
    return _exit_code(record)


def _exit_code(record: Any) -> int:
    """A record may name one, where what was asked for is done and the answer is no."""
    return int(record.get("exit_code", 0)) if isinstance(record, dict) else 0


# Parsing ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One line per mistake, like every other error."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        print(f"dsa-rt: error: {line} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    about = "Video diffusion with adaptive compute: the same weights, as many passes as each chunk needs."
    parser = _Parser(
        prog="dsa-rt",
        description=about,
        epilog=EXIT_CODES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"dsa-rt {dsa_rt.__version__}",
        help="print the version and exit",
    )
    known = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], Any], about: str) -> argparse.ArgumentParser:
        made = known.add_parser(
            name,
            help=about,
            description=about,
            epilog=EXIT_CODES,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        made.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else there"
        )
        made.add_argument("--traceback", action="store_true", help="with an error, show where it came from")
        return made

    make = command("generate", commands.generate, "make a video from a prompt")
    make.add_argument(
        "prompt", help='for example "a red square bouncing, a blue circle at rest"; see dsa-rt prompts'
    )
    files = make.add_argument_group("files")
    files.add_argument(
        "--out",
        metavar="PATH",
        help="the video: .mp4, .gif, .npy, .npz; PNG frames: a folder or a pattern such as frame-%%04d.png",
    )
    files.add_argument(
        "--scale", type=int, default=1, metavar="N", help="enlarge MP4, GIF and PNG N times, pixel by pixel"
    )
    files.add_argument("--stats", metavar="PATH.json", help="write what was spent as JSON")
    files.add_argument(
        "--chart", metavar="PATH.png", help="draw passes and confidence per chunk (.png, .svg, .pdf)"
    )
    what = make.add_argument_group("what to make")
    what.add_argument(
        "--bundle", default="demo", help="demo, demo-many-step or a folder (default: %(default)s)"
    )
    what.add_argument(
        "--policy",
        help="dsa, dsa-paper, dsa:calls=24, dsa:fps=16, dense, fixed-2, fixed-4-then-1, …; for many-step bundles "
        "hsa-50, hsa-75a, window-55, hsa-25:update=extrapolated, … "
        "(default: dsa where the bundle has a confidence head, else dense)",
    )
    what.add_argument(
        "--image", metavar="FILE", help="the first frame, for image-to-video bundles, in the size of the video"
    )
    what.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from, for many-step bundles"
    )
    what.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    for name, meaning in (
        ("frames", "frames of the video"),
        ("height", "in pixels"),
        ("width", "in pixels"),
        ("window", "latent frames attention looks back on, sink included"),
        ("sink", "first latent frames that stay in the window"),
        ("steps", "passes of a many-step bundle"),
    ):
        what.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default: the bundle's)")
    what.add_argument(
        "--guidance-scale", type=float, metavar="X", help="for many-step bundles (default: the bundle's)"
    )
    what.add_argument(
        "--guidance-scale-2", type=float, metavar="X", help="of the second of two experts (default: as the first)"
    )
    how = make.add_argument_group("how")
    how.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    how.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="default: %(default)s"
    )
    how.add_argument(
        "--decoder", metavar="FILE", help="a tiny decoder (.safetensors) in place of the bundle's video codec"
    )
    how.add_argument(
        "--memory-limit", metavar="SIZE", help="refuse to take more than this, for example 2GB or 512MiB"
    )
    how.add_argument("--kv-storage", default="auto", choices=KV_STORAGES, help=f"{KV_HELP} (default: %(default)s)")
    how.add_argument("--quiet", action="store_true", help="no progress bar, no table")

    _add_export(command("export", commands.export, "turn a published Wan checkpoint into a bundle"))
    look = command("inspect", commands.inspect, "show what is in a bundle, and check it")
    look.add_argument("bundle", help="demo, demo-many-step or a folder")
    look.add_argument(
        "--policy", help="also show what a many-step run under it computes and takes: hsa-50, hsa-75a, dense, …"
    )
    for name in ("height", "width", "frames", "steps"):
        look.add_argument(f"--{name}", type=int, metavar="N", help="of that run (default: the bundle's)")
    look.add_argument("--memory-limit", metavar="SIZE", help="of that run, for example 2GB; says whether it fits")
    look.add_argument("--kv-storage", choices=KV_STORAGES, help=f"{KV_HELP} (default: auto)")
    look.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), help="of that run (default: auto)")
    look.add_argument("--device", choices=("cpu", "cuda"), help="of that run; need not be here (default: cpu)")
    _add_bench(command("bench", commands.bench, "measure speed, latency and memory, or compare two measurements"))
    command("prompts", commands.prompts, "show what the demo understands, with examples")
    command(
        "doctor", commands.doctor, "show what was found on this machine, which backend runs what, and why"
    )
    known.add_parser(
        "train", add_help=False, help="train the demo again; dsa-rt train --help has the options"
    )
    return parser


def _add_export(make: argparse.ArgumentParser) -> None:
    make.add_argument(
        "source",
        help="a diffusers folder (WanPipeline, WanImageToVideoPipeline), a folder or .safetensors file in the original "
        "Wan layout, or a .pt file such as Self-Forcing's",
    )
    make.add_argument("dest", help="the bundle's folder; an export that was interrupted goes on")
    files = make.add_argument_group("files")
    files.add_argument(
        "--components",
        action="append",
        default=[],
        metavar="FOLDER",
        help="where text encoder, tokenizer, video codec and image encoder are that the source lacks: a diffusers "
        "folder, or that of one of them; may be repeated",
    )
    files.add_argument("--decoder", metavar="FILE", help="a tiny decoder (TAEHV) in place of the video codec")
    files.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of all weights (default: what each tensor has)"
    )
    files.add_argument(
        "--weights", choices=("ema", "raw"), help="which generator of a .pt file (default: ema if it is there)"
    )
    files.add_argument("--shard-size", default="4GB", metavar="SIZE", help="of one file (default: %(default)s)")
    files.add_argument("--overwrite", action="store_true", help="replace a bundle of that name")
    files.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    how = make.add_argument_group("how it is run (the defaults are usual for its kind)")
    how.add_argument("--name", help="of the bundle (default: the source's)")
    how.add_argument(
        "--form", choices=("causal", "bidirectional"), help="how it was trained (default: causal for .pt files)"
    )
    steps = how.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=int, metavar="N", help="Euler steps of a many-step generator")
    steps.add_argument("--timesteps", metavar="LIST", help="of a few-step generator: 1000,750,500,250")
    for name, kind, meaning in (
        ("shift", float, "of the schedule (default: the scheduler's, else 5)"),
        ("guidance-scale", float, "default scale, 1 = none"),
        ("height", int, "in pixels"),
        ("width", int, "in pixels"),
        ("frames", int, "of the clips it was trained on"),
        ("fps", float, "frames per second of the video"),
        ("chunk-frames", int, "latent frames of a chunk (causal)"),
        ("window", int, "latent frames attention looks back on, sink included (causal)"),
        ("sink", int, "first latent frames that stay in the window (causal)"),
        ("boundary", float, "where the second expert takes over, a part of the timesteps"),
    ):
        how.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=meaning)
    how.add_argument("--taps", metavar="LIST", help="blocks that the confidence head reads, from 0: 13,21,29")


def _add_bench(make: argparse.ArgumentParser) -> None:
    make.epilog = f"{EXIT_CODES}  1 also says that --compare found something worse beyond noise\n"
    make.add_argument(
        "cases", nargs="*", metavar="CASE", help="names or patterns such as 'demo-*' (default: all); --list shows them"
    )
    make.add_argument("--list", action="store_true", help="show the cases and which can run here, and measure nothing")
    make.add_argument(
        "--compare", nargs=2, metavar=("A.json", "B.json"), help="say what changed from one result to another"
    )
    make.add_argument(
        "--out", type=Path, default=Path("bench-results"), metavar="DIR",
        help="folder for suite.json and pictures (default: %(default)s)",
    )  # fmt: skip
    make.add_argument("--quick", action="store_true", help="clips of 33 frames, to see that it works")
    make.add_argument(
        "--runs", type=int, default=7, metavar="N", help="timed runs of each case, 5 or more (default: %(default)s)"
    )
    make.add_argument("--device", default="cpu", help="of the demo's cases: cpu, cuda (default: %(default)s)")
    make.add_argument("--threads", type=int, metavar="N", help="torch threads (default: torch's)")
    make.add_argument("--quiet", action="store_true", help="no progress line")


# Errors -----------------------------------------------------------------------------------------


def _explain(error: BaseException, signals: Sequence[int]) -> tuple[int, str]:
    """Exit code and the one line for an error."""
    text = " ".join(str(error).split())
    if signal.SIGTERM in signals:
        return 143, "terminated; nothing was left half-written"
    if signals or isinstance(error, (KeyboardInterrupt, Cancelled)):
        return 130, "interrupted; nothing was left half-written"
    if isinstance(error, MemoryLimitError):
        return 5, f"error: {text}"
    for kind, code in ((OutputError, 4), (BundleError, 3), (OptionError, 2), (DsaRtError, 1)):
        if isinstance(error, kind):
            return code, f"error: {text}"
    said = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    if isinstance(error, MemoryError) or said:  # torch says it with a RuntimeError
        remedy = "lower --frames, --height, --width or --window"
        return 5, f"error: out of memory ({text[:200] or 'no details'}); {remedy}"
    if isinstance(error, OSError):
        return 4 if error.filename is None else 1, f"error: {text}"
    return 1, f"error: unexpected {type(error).__name__}: {text} (--traceback shows where)"


if __name__ == "__main__":
    sys.exit(main())
