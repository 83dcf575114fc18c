"""What benchmarks share: the fingerprint of a result, percentiles, tables and JSON files."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsa_rt.machine import machine, versions
from dsa_rt.output import whole_file

ROOT = Path(__file__).resolve().parents[2]  # of the repository, where the package runs from one
BUSY = 0.35  # load per core above which other work is likely to be in a timing


def fingerprint(
    program: str, settings: argparse.Namespace | Mapping[str, Any], *, warm_up: str, included: Sequence[str]
) -> dict[str, Any]:
    """Where, when, of what and how a result was made, JSON-ready; take it before the measurement starts.

    program: as one would run it again. warm_up: what was run and thrown away before the first figure. included: what
    figures contain and what they do not.
    """
    stated = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    return {
        "program": program,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine() | {"clock_mhz": _clocks()},
        "load_before": _load(),
        "versions": versions(),
        "settings": {key: _plain(value) for key, value in stated.items() if key not in ("out", "quiet")},
        "warm_up": warm_up,
        "included": list(included),
    }


def commit() -> str | None:
    """The commit that the package runs from, with "+changes" where tracked files differ from it; None for a package
    that was installed.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None  # some other repository holds the environment that the package is installed in
        head = _git("rev-parse", "HEAD")
        return head + (
            "+changes"
            if _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
            else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _clocks() -> list[float] | None:
    """Clock of each core in MHz at this moment."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")] or None
    except OSError:
        return None


def _load() -> float | None:
    """Processes that wanted a core in the last minute, on average."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def warn_if_busy(result: Mapping[str, Any]) -> str | None:
    """A line to print when other work ran on the machine before a timing; its fingerprint says the same."""
    load, cores = result["load_before"], result["machine"]["cores"] or 1
    if load is not None and load > BUSY * cores:
        return f"note: the machine was busy (load {load} on {cores} cores); times may be too long"
    return None


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, 20th and 80th percentile and count; None where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, middle, high = np.percentile(known, [20, 50, 80]).tolist()
    return {"median": middle, "p20": low, "p80": high, "n": len(known)}


def median(entry: Mapping[str, float] | None) -> float | None:
    """The median of what :func:`spread` made."""
    return None if entry is None else entry["median"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first one to the left, figures to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([text(lines[0]), f"|{rule}|", *map(text, lines[1:])])


def figure(value: float | None, digits: int = 1, *, scale: float = 1.0, unit: str = "") -> str:
    """A number for a table; "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value * scale:.{digits}f}{unit}"


def write_json(folder: Path, name: str, result: Mapping[str, Any], *, indent: int | None = 1) -> Path:
    """``folder/name``, written whole or not at all; infinite and undefined numbers become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with whole_file(path) as temporary:
        temporary.write_text(
            json.dumps(_plain(result), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
        )
    return path


def show_path(path: Path) -> str:
    """A path as a person in the repository would write it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
