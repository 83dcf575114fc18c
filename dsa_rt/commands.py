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
from collections.abc import Callable
from typing import Any, TypeVar, cast

from dsa_rt.errors import OptionError
from dsa_rt.interrupts import load_modules

_Number = TypeVar("_Number", int, float)


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
    if options.image is not None and not os.path.isfile(options.image):
        raise OptionError(f"image {options.image!r} cannot be read (no such file); name a PNG, JPEG or WebP file")

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

        runtime = dsa_rt.load(
            options.bundle, device=options.device, dtype=options.dtype, decoder=options.decoder
        )
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
            guidance_scale_2=options.guidance_scale_2,
            memory_limit=options.memory_limit,
            kv_storage=options.kv_storage,
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
        video = cast(
            Video,
            generate(
                options.prompt,
                seed=options.seed,
                on_event=bar,
                image=options.image,
                negative_prompt=options.negative_prompt,
            ),
        )
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


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Turns a published checkpoint into a bundle."""
    from dsa_rt.memory import parse_bytes

    try:
        shard_bytes = parse_bytes(options.shard_size)
    except OptionError as error:
        raise OptionError(f"--shard-size is {options.shard_size!r}; expected a size such as 4GB") from error
    assert shard_bytes is not None
    load_modules("dsa_rt.convert", "dsa_rt.codec.conv")
    from dsa_rt.bundle import describe, describe_text
    from dsa_rt.convert import Choices, convert

    timesteps, taps = _numbers("timesteps", options.timesteps, float), _numbers("taps", options.taps, int)
    choices = Choices(
        name=options.name,
        form=options.form,
        steps=options.steps if timesteps is None else timesteps,
        shift=options.shift,
        guidance=options.guidance_scale,
        height=options.height,
        width=options.width,
        frames=options.frames,
        fps=options.fps,
        chunk_frames=options.chunk_frames,
        window=options.window,
        sink=options.sink,
        boundary=options.boundary,
        taps=taps,
    )
    quiet = options.quiet or options.json
    with _BytesBar(f"exporting {os.path.basename(options.dest)}", enabled=not quiet) as bar:
        bundle = convert(
            options.source,
            options.dest,
            components=options.components,
            decoder=options.decoder,
            dtype=options.dtype,
            weights=options.weights,
            choices=choices,
            shard_bytes=shard_bytes,
            overwrite=options.overwrite,
            progress=bar,
        )
    if not quiet:
        print(describe_text(bundle))
        needed = ["codec", "text_encoder"]
        needed += ["image_encoder"] if bundle.manifest.architecture.get("image_dim") is not None else []
        missing = [part for part in needed if getattr(bundle.manifest, part) is None]
        if missing:
            print(
                f"dsa-rt: note: the source has no {' and no '.join(missing)}, so that this bundle cannot be run; "
                "export it again with --components FOLDER",
                file=sys.stderr,
            )
    return describe(bundle)


def _numbers(name: str, text: str | None, kind: Callable[[str], _Number]) -> tuple[_Number, ...] | None:
    """A list of numbers from an option's text."""
    try:
        return None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"--{name} is {text!r}; expected numbers with commas between them") from error


class _BytesBar:
    """A bar on stderr that counts bytes; silent when disabled or when stderr is no terminal."""

    def __init__(self, text: str, enabled: bool) -> None:
        self._text, self._enabled = text, enabled and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> _BytesBar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if not self._enabled:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc=self._text, total=total, unit="B", unit_scale=True, file=sys.stderr, leave=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def inspect(options: argparse.Namespace) -> dict[str, Any]:
    """Checks a bundle and shows its manifest; with a policy what a many-step run under it will compute and take."""
    names = ("height", "width", "frames", "steps", "memory_limit", "kv_storage", "dtype", "device")
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    stated = [f"--{name.replace('_', '-')}" for name in asked]
    if stated and options.policy is None:
        raise OptionError(f"{', '.join(stated)} belongs to a run: name its policy too, for example --policy hsa-50")
    load_modules("dsa_rt.runtime")
    from dsa_rt.bundle import describe, describe_plan, describe_plan_text, describe_text, open_bundle
    from dsa_rt.runtime import DTYPES, dtype_for, find_bundle

    bundle = open_bundle(find_bundle(options.bundle))
    record = describe(bundle)
    if options.policy is None:
        if not options.json:
            print(describe_text(bundle))
        return record
    from dsa_rt.models.config import WanConfig
    from dsa_rt.settings import preview
    from dsa_rt.sync import sync_bytes

    asked["dtype"] = dtype_for(options.dtype or "auto", options.device or "cpu")
    seen = preview(bundle, options.policy, **asked)
    model, branches = bundle.config("architecture", WanConfig), 1 if bundle.manifest.guidance == 1 else 2
    sizes = {
        name: sync_bytes(seen.token_plan, branches, model.layers, model.heads, model.head_dim, DTYPES[name])
        for name in ("bf16", "fp32")
    }
    record["plan"] = describe_plan(seen.policy, seen.token_plan, sizes) | {"memory": seen.memory.to_dict()}
    if not options.json:
        place = f"memory on {options.device or 'cpu'} in {str(asked['dtype']).removeprefix('torch.')}"
        print(describe_text(bundle), describe_plan_text(record["plan"]), sep="\n\n")
        print("", place, seen.memory.table(), sep="\n")
    return record


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the suite's cases, lists them, or compares two results."""
    load_modules("dsa_rt.runtime")
    from dsa_rt.suite.command import bench as run

    return run(options)


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
