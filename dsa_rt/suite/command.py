"""``dsa-rt bench``: measure, list, compare."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from dsa_rt.errors import OptionError
from dsa_rt.suite import cases as known
from dsa_rt.suite.compare import compare
from dsa_rt.suite.measure import LEAST_RUNS, measure, refusal
from dsa_rt.suite.pictures import draw
from dsa_rt.suite.records import show_path, table, write_json
from dsa_rt.suite.report import report
from dsa_rt.suite.schema import read


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Does what the options ask for and returns the record that --json prints; its ``exit_code`` is the command's."""
    if options.compare is not None:
        return _compare(options)
    selected = known.select(options.cases)
    if options.list:
        return _list(options, selected)
    if options.runs < LEAST_RUNS:
        raise OptionError(f"--runs is {options.runs}; expected {LEAST_RUNS} or more")
    if options.threads is not None:
        if options.threads < 1:
            raise OptionError(f"--threads is {options.threads}; expected 1 or more")
        torch.set_num_threads(options.threads)
    if options.quick:
        selected = [known.quick(case) for case in selected]
    asked = {"cases": list(options.cases), "quick": options.quick}
    result = measure(
        selected, place=options.device, runs=options.runs, settings=asked,
        warm_up_seconds=10.0 if options.quick else 60.0, progress=_Line(enabled=not (options.quiet or options.json)),
    )  # fmt: skip
    path = write_json(options.out, "suite.json", result)
    result = read(path)  # as written: what does not validate is a fault here and not in whoever reads it next
    written = [path, *draw(result, options.out)]
    if not options.json:
        print(report(result))
        print("\nwritten:", ", ".join(show_path(file) for file in written))
    return result


def _list(options: argparse.Namespace, selected: list[known.Case]) -> dict[str, Any]:
    reasons = {case.name: refusal(case, options.device) for case in selected}
    if not options.json:
        rows = [[case.name, case.policy, case.about, reasons[case.name] or "yes"] for case in selected]
        print(table(["case", "policy", "what", "runs here"], rows))
    return {"cases": [case.to_dict() | {"refusal": reasons[case.name]} for case in selected]}


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    before, after = (read(path) for path in options.compare)
    found = compare(before, after)
    if not options.json:
        print(found.report())
    return found.to_dict() | {"exit_code": 1 if found.worse else 0}


class _Line:
    """What is being done, on one line of a terminal."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._enabled:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

