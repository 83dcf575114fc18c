"""What the commands of the command line do.

Each takes the parsed options, prints for people unless --json was asked for, and returns the record that
--json prints. Heavy imports stay inside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, cast

from dsa_rt.errors import OptionError
from dsa_rt.interrupts import load_modules


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Loads, compiles, generates and writes what was asked for."""
    from dsa_rt.output import CHART_FORMATS, RECORD_FORMATS, VIDEO_FORMATS, check_output, whole_file

    outputs = {"out": options.out, "stats": options.stats, "chart": options.chart}
    outputs = {name: path for name, path in outputs.items() if path is not None}
    if not outputs and not options.json:
        raise OptionError("nothing to write: name a file with --out (or --stats, --chart, or use --json)")
    if len({os.path.abspath(path) for path in outputs.values()}) < len(outputs):
        raise OptionError("two of --out, --stats and --chart name the same file: give each its own")
    formats = {"out": VIDEO_FORMATS, "stats": RECORD_FORMATS, "chart": CHART_FORMATS}
    for name, path in outputs.items():  # before the first slow thing
        check_output(path, formats[name], frames=options.frames)
    if options.scale < 1:
        raise OptionError(f"--scale is {options.scale}; expected a whole number from 1")

    from dsa_rt.progress import ProgressBar

    quiet = options.quiet or options.json
    spent = _Stopwatch()
    with ProgressBar(enabled=not quiet) as bar:
        bar.stage(f"loading {options.bundle}")
        charting = ["matplotlib.figure", "matplotlib.backends.backend_agg"] if options.chart else []
        load_modules("dsa_rt.runtime", *charting)
        import dsa_rt
        from dsa_rt.media import Video
        from dsa_rt.stats import Stats

        runtime = dsa_rt.load(options.bundle, device=options.device, dtype=options.dtype)
        spent.lap("load")
        bar.stage("compiling")
        generate = runtime.compile(
            height=options.height,
            width=options.width,
            frames=options.frames,
            policy=options.policy,
            window=options.window,
            sink=options.sink,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            memory_limit=options.memory_limit,
            on_event=bar,
        )
        spent.lap("compile")
        if options.out is not None:  # now the number of frames is known
            check_output(options.out, frames=generate.settings.frames)
        bar.close()
        if not quiet:
            plan = ", ".join(" ".join(line.split()) for line in generate.plan.table().splitlines())
            print(f"planned memory: {plan}", file=sys.stderr)
        bar.stage("generating")
        video = cast(Video, generate(options.prompt, seed=options.seed, on_event=bar))
        stats = cast(Stats, video.stats)
        spent.lap("generate")
        bar.stage("writing")
        if options.out is not None:
            video.save(options.out, scale=options.scale)
        if options.stats is not None:
            with whole_file(options.stats) as file:
                file.write_text(
                    json.dumps(stats.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
                )
        if options.chart is not None:
            from dsa_rt.chart import chart

            chart(video, options.chart)
        spent.lap("write")
    if not quiet:
        print(stats.table())
        if options.out is not None:
            count, height, width, _ = video.frames.shape
            what = f"{count} frames of {height}x{width}, {video.seconds:.2f} s at {video.fps:g} fps"
            print(f"video              {options.out} ({what})")
        if options.stats is not None:
            print(f"statistics         {options.stats}")
        if options.chart is not None:
            print(f"chart              {options.chart}")
    del spent.laps["generate"]  # stats says that, in its parts
    return {"stats": stats.to_dict(), "outputs": outputs, "excluded_ms": spent.laps}


def inspect(options: argparse.Namespace) -> dict[str, Any]:
    """Checks a bundle and shows its manifest."""
    load_modules("dsa_rt.runtime")
    from dsa_rt.bundle import describe, describe_text, open_bundle
    from dsa_rt.runtime import find_bundle

    bundle = open_bundle(find_bundle(options.bundle))
    if not options.json:
        print(describe_text(bundle))
    return describe(bundle)


def doctor(options: argparse.Namespace) -> dict[str, Any]:
    """Shows what was found on this machine."""
    load_modules("torch")
    from dsa_rt.doctor import examine, report

    found = examine()
    if not options.json:
        print(report(found))
    return found


def prompts(options: argparse.Namespace) -> dict[str, Any]:
    """Shows what the demo understands, with examples."""
    load_modules("dsa_rt.demo.grammar")
    from dsa_rt.demo import grammar

    examples = grammar.example_prompts()
    if not options.json:
        print(
            grammar.HELP,
            "",
            *(f'dsa-rt generate "{example}" --out clip.mp4' for example in examples),
            sep="\n",
        )
    return {
        "colours": list(grammar.COLOURS),
        "shapes": list(grammar.SHAPES),
        "motions": list(grammar.MOTIONS),
        "grounds": list(grammar.GROUNDS),
        "examples": examples,
    }


class _Stopwatch:
    """Milliseconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = 1000 * (now - self._last)
        self._last = now
