"""What a result file holds, and a check that says where one does not.

A schema is data: a type, a dict of named fields, ``Each`` of a list, ``Named`` values of a dict with free keys,
``Maybe`` null. Fields that a schema does not name are refused, since a later version may mean something by them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dsa_rt.errors import OptionError

SCHEMA = "dsa_rt.suite/1"
"""Name and version of the format; raised whenever a field changes its meaning."""


@dataclass(frozen=True)
class Each:
    """A list, every item alike, of ``least`` items or more."""

    item: Spec
    least: int = 0


@dataclass(frozen=True)
class Named:
    """A dict from any text to items that are alike."""

    item: Spec


@dataclass(frozen=True)
class Maybe:
    """The item or null."""

    item: Spec


ANYTHING = object
NUMBER = float  # finite; whole numbers are numbers too
Spec: TypeAlias = type | dict[str, Any] | Each | Named | Maybe

SPREAD: Spec = {"median": NUMBER, "p20": NUMBER, "p80": NUMBER, "n": int}
RUN: Spec = {
    "fps_denoise": NUMBER, "fps_with_decode": NUMBER, "fps_end_to_end": NUMBER, "first_frame_ms": NUMBER,
    "gaps_ms": Each(NUMBER), "deadlines": int, "deadline_misses": int, "stall_ms": NUMBER, "nfe": int,
    "active_token_share": Maybe(NUMBER), "text_ms": NUMBER, "denoise_ms": NUMBER, "context_ms": NUMBER,
    "decode_ms": NUMBER, "total_ms": NUMBER, "tflop": NUMBER, "tflop_s": NUMBER, "gbytes": NUMBER, "frames": int,
    "chunk_frames": Each(int),
    "energy_j": Maybe(NUMBER),
}  # fmt: skip
CASE: Spec = {
    "name": str, "case": Named(ANYTHING), "random_weights": bool,
    "made": {"bundle": str, "device": str, "dtype": str, "policy": str, "height": int, "width": int, "frames": int,
             "fps": NUMBER, "passes_scheduled": int, "chunks": int},
    "peak": str, "load_s": NUMBER, "compile_s": NUMBER,
    "warm_up": {"runs": int, "ended_by": str, "difference": Maybe(NUMBER), "seconds": NUMBER},
    "memory": {"planned_bytes": int, "planned_weights_bytes": int, "peak_bytes": Maybe(int),
               "before_bytes": Maybe(int), "of": str, "missing": Maybe(str)},
    "energy_missing": Maybe(str), "runs": Each(RUN, least=5), "figures": Named(Maybe(SPREAD)),
    "between_chunks_ms": Maybe({"p50": NUMBER, "p95": NUMBER, "p99": NUMBER, "n": int}),
    "deadlines": {"misses": int, "n": int},
    "roofline": {"flop_per_byte": NUMBER, "roof_tflop_s": NUMBER, "share": NUMBER},
}  # fmt: skip
RESULT: Spec = {
    "schema": str, "program": str, "date": str, "commit": Maybe(str), "machine": Named(ANYTHING),
    "load_before": Maybe(NUMBER), "versions": Named(str), "settings": Named(ANYTHING), "warm_up": str,
    "included": Each(str), "gpu": Maybe(Named(ANYTHING)), "not_run": Named(str), "cases": Each(CASE),
    "peaks": Named({"device": str, "dtype": str, "tflop_s": NUMBER, "gb_s": NUMBER, "matmul": Each(int),
                    "copy_bytes": int, "n": int}),
    "timeline": Maybe({"case": str, "events": Each({"kind": str, "chunk": int, "passes": int, "seconds": NUMBER})}),
}  # fmt: skip

_NAMES: Mapping[Any, str] = {str: "text", int: "a whole number", NUMBER: "a finite number", bool: "true or false"}


def validate(result: object) -> None:
    """:class:`OptionError` that names the place of the first fault, such as ``cases[2].runs[0].gaps_ms[3]``."""
    version = result.get("schema") if isinstance(result, dict) else None
    if version != SCHEMA:
        raise OptionError(
            f"schema is {version!r}; this version reads {SCHEMA!r}: measure again with this version, or use the one "
            "that wrote the file"
        )
    _check("", result, RESULT)
    assert isinstance(result, dict)
    names = [case["name"] for case in result["cases"]]
    for number, case in enumerate(result["cases"]):
        where = f"cases[{number}]"
        if names.index(case["name"]) != number:
            raise OptionError(f"{where}.name: {case['name']!r} is there twice; expected every case once")
        if case["peak"] not in result["peaks"]:
            raise OptionError(f"{where}.peak: {case['peak']!r} is not among the peaks; expected one of them")
        for name, spread in case["figures"].items():
            if spread is not None and spread["n"] != len(case["runs"]):
                raise OptionError(
                    f"{where}.figures.{name}.n: is {spread['n']}; expected {len(case['runs'])}, the number of runs"
                )


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result from its file; :class:`OptionError` that names the file for one that cannot be read or is none."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{os.fspath(path)!r} cannot be read ({error.strerror}); name a suite.json") from error
    except ValueError as error:
        raise OptionError(f"{os.fspath(path)!r} is no JSON file ({error}); name a suite.json") from error
    try:
        validate(result)
    except OptionError as error:
        raise OptionError(f"{os.fspath(path)!r}: {error}") from error
    assert isinstance(result, dict)
    return result


def _check(where: str, value: object, spec: Spec) -> None:
    if isinstance(spec, Maybe):
        if value is not None:
            _check(where, value, spec.item)
    elif isinstance(spec, Each):
        if not isinstance(value, list) or len(value) < spec.least:
            raise _fault(where, value, f"a list of {spec.least} items or more" if spec.least else "a list")
        for number, item in enumerate(value):
            _check(f"{where}[{number}]", item, spec.item)
    elif isinstance(spec, Named):
        if not isinstance(value, dict):
            raise _fault(where, value, "an object")
        for name, item in value.items():
            _check(_inside(where, name), item, spec.item)
    elif isinstance(spec, dict):
        if not isinstance(value, dict):
            raise _fault(where, value, "an object")
        for name in dict.fromkeys([*spec, *value]):
            if name not in value:
                raise OptionError(f"{_inside(where, name)}: is missing")
            if name not in spec:
                raise OptionError(f"{_inside(where, name)}: is not known")
            _check(_inside(where, name), value[name], spec[name])
    elif not _is(value, spec):
        raise _fault(where, value, _NAMES[spec])


def _is(value: object, kind: type) -> bool:
    if kind is ANYTHING:
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is NUMBER:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _fault(where: str, value: object, expected: str) -> OptionError:
    shown = repr(value)
    if isinstance(value, list):
        shown = f"a list of {len(value)}"
    return OptionError(f"{where}: is {shown[:60]}; expected {expected}")
