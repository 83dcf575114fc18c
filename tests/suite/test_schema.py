"""Damaged files are refused with the place of the fault, wherever it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsa_rt.errors import OptionError
from dsa_rt.suite.schema import SCHEMA, read, validate

FREE = ("machine", "versions", "settings", "not_run", "case", "gpu", "peaks", "figures")  # any key may be there


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a result, of lists the first and the last item."""
    if where:
        yield where
    if isinstance(value, dict):
        for name, item in value.items():
            yield from places(item, (*where, name))
    elif isinstance(value, list):
        for number in {0, len(value) - 1} if value else ():
            yield from places(value[number], (*where, number))


def text(where: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def parent(result: dict[str, Any], where: tuple[Any, ...]) -> Any:
    value: Any = result
    for part in where[:-1]:
        value = value[part]
    return value


def test_a_good_file_validates(result: dict[str, Any]) -> None:
    validate(result)


def test_every_missing_field_is_named(result: dict[str, Any]) -> None:
    seen = 0
    for where in list(places(result)):
        if isinstance(where[-1], int) or (len(where) > 1 and where[-2] in FREE) or where == ("schema",):
            continue
        kept = parent(result, where).pop(where[-1])
        with pytest.raises(OptionError, match=f"^{re.escape(text(where))}: is missing$"):
            validate(result)
        parent(result, where)[where[-1]] = kept
        seen += 1
    assert seen > 100


def test_every_wrong_value_is_named(result: dict[str, Any]) -> None:
    seen = 0
    result["cases"] = result["cases"][1:3]  # as good as all
    for where in list(places(result)):
        if any(part in ("machine", "settings", "case") for part in where[:-1]) or where == ("schema",):
            continue
        kept = parent(result, where)[where[-1]]
        parent(result, where)[where[-1]] = {"a": object()} if isinstance(where[-1], int) else [object()]
        with pytest.raises(OptionError) as error:
            validate(result)
        assert str(error.value).startswith(text(where)), where
        parent(result, where)[where[-1]] = kept
        seen += 1
    assert seen > 200


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("cases", 0, "runs", 2, "nfe"), 1.5, "cases[0].runs[2].nfe: is 1.5; expected a whole number"),
        (("cases", 0, "runs", 2, "nfe"), True, "cases[0].runs[2].nfe: is True; expected a whole number"),
        (("cases", 1, "runs", 0, "gaps_ms", 1), None, "cases[1].runs[0].gaps_ms[1]: is None; expected a finite number"),
        (("cases", 1, "load_s"), float("nan"), "cases[1].load_s: is nan; expected a finite number"),
        (("cases", 1, "load_s"), float("inf"), "cases[1].load_s: is inf; expected a finite number"),
        (("cases", 1, "random_weights"), 1, "cases[1].random_weights: is 1; expected true or false"),
        (("cases", 0, "runs"), [], "cases[0].runs: is a list of 0; expected a list of 5 items or more"),
        (("cases", 1, "name"), "dense", "cases[1].name: 'dense' is there twice; expected every case once"),
        (("cases", 1, "peak"), "cpu", "cases[1].peak: 'cpu' is not among the peaks; expected one of them"),
        (("cases", 0, "figures", "nfe", "n"), 4, "cases[0].figures.nfe.n: is 4; expected 5, the number of runs"),
        (("surplus",), 1, "surplus: is not known"),
    ],
)
def test_what_is_said(result: dict[str, Any], where: tuple[Any, ...], value: Any, said: str) -> None:
    parent(result, where)[where[-1]] = value
    with pytest.raises(OptionError) as error:
        validate(result)
    assert str(error.value) == said


@pytest.mark.parametrize("version", ["dsa_rt.suite/0", None, 1])
def test_another_version_is_refused(result: dict[str, Any], version: Any) -> None:
    result["schema"] = version
    with pytest.raises(OptionError, match=f"schema is {version!r}; this version reads '{SCHEMA}'"):
        validate(result)
    with pytest.raises(OptionError, match="schema is None"):
        validate([result])


def test_files(tmp_path: Path, result: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"absent\.json' cannot be read \(No such file or directory\)"):
        read(tmp_path / "absent.json")
    file = tmp_path / "a.json"
    file.write_text("{")
    with pytest.raises(OptionError, match=r"a\.json' is no JSON file"):
        read(file)
    del result["cases"][2]["peak"]
    file.write_text(json.dumps(result))
    with pytest.raises(OptionError, match=r"a\.json': cases\[2\]\.peak: is missing"):
        read(file)
