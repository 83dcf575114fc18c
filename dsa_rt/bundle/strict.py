"""JSON into typed values, nothing guessed: a missing, unknown or mistyped member is an error that says where.

Owners of a manifest section (model, head, codec) describe it as a dataclass, which is read with
:func:`parse`; value checks belong into the dataclass's ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar

from dsa_rt.errors import BundleError

MAX_JSON_BYTES = (
    8 << 20
)  # of the manifest, a shard index or a safetensors header; the largest real ones are under 1 MiB
DAMAGED = "the file is damaged or was changed: copy or export the bundle again"

OPTIONAL = {"optional": True}  # metadata of a dataclass field that came later: a key that may be missing

T = TypeVar("T")

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 100
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    tuple: "a list",
    type(None): "null",
}


def short(value: object) -> str:
    """repr for messages: escapes control characters and cuts what is long."""
    return _shortened.repr(value)


def load_json(text: bytes, where: str) -> Any:
    """UTF-8 JSON -> value. Doubled keys, NaN, infinities, integers over 64 bits, broken text: BundleError."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"{short(key)} appears twice")
            result[key] = value
        return result

    def number(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise ValueError(f"the number {short(digits)} is not finite")
        return float(digits)

    def whole(digits: str) -> int:
        if len(digits) > 20 or abs(int(digits)) >= 1 << 63:
            raise ValueError(f"the number {short(digits)} does not fit into 64 bits")
        return int(digits)

    if len(text) > MAX_JSON_BYTES:
        raise BundleError(f"{where} is larger than {MAX_JSON_BYTES} bytes, which no bundle needs; {DAMAGED}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=members,
            parse_float=number,
            parse_int=whole,
            parse_constant=number,
        )
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode(
            "utf-8"
        )  # refuses half surrogate pairs, which cannot be printed
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise BundleError(f"{where} is not valid JSON ({reason}); {DAMAGED}") from error
    return value


def _check_depth(value: Any, room: int = 32) -> None:
    """So that whoever walks the value later may recurse."""
    if room == 0:
        raise RecursionError
    if isinstance(value, (dict, list)):
        for member in value.values() if isinstance(value, dict) else value:
            _check_depth(member, room - 1)


def parse(kind: type[T], value: Any, where: str) -> T:
    """A JSON value as `kind`: dataclass, int, float, str, bool, dict, list, tuple, Literal or a union.

    A dataclass needs exactly its fields as keys, defaults or not; only a field with the metadata OPTIONAL
    may be missing. `where` names the place in messages, for example "manifest.json: schedule". Raises BundleError.
    """
    return typing.cast(T, _parse(kind, value, where))


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _parse_union(arguments, value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            choices = " or ".join(json.dumps(choice) for choice in arguments)
            raise BundleError(f"{where} is {short(value)}; this version of dsa_rt knows {choices}")
        return value
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    plain: Any = origin or kind
    if plain is float and type(value) is int:
        value = float(value)
    if type(value) is not (list if plain is tuple else plain):  # type(), because True is also an int
        raise BundleError(f"{where} is {short(value)}; expected {_EXPECTED.get(plain, plain)}")
    if plain is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise BundleError(f"{where} is {short(value)}; expected a list of {len(arguments)}")
        return tuple(
            _parse(item, member, f"{where}[{i}]")
            for i, (item, member) in enumerate(zip(arguments, value, strict=True))
        )
    if plain in (list, tuple) and arguments:
        return plain(_parse(arguments[0], member, f"{where}[{i}]") for i, member in enumerate(value))
    if isinstance(value, dict) and arguments:  # JSON keys are text
        return {key: _parse(arguments[1], member, f"{where}: {short(key)}") for key, member in value.items()}
    return value


def _parse_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not type(None)]
    for kind in others:
        try:
            return _parse(kind, value, where)
        except BundleError:
            pass
    return _parse(last, value, where)


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {short(value)}; expected an object")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    names = list(fields)
    missing = [name for name in names if name not in value and not fields[name].metadata.get("optional")]
    unknown = [name for name in value if name not in names]
    if missing or unknown:
        faults = " and ".join(
            f"{what} keys {', '.join(map(short, keys[:5]))}"
            for what, keys in (("missing", missing), ("unknown", unknown))
            if keys
        )
        raise BundleError(f"{where} has {faults}; export the bundle with this version of dsa_rt")
    hints = typing.get_type_hints(kind)
    members = {name: _parse(hints[name], value[name], f"{where}: {name}") for name in names if name in value}
    try:
        return kind(**members)
    except ValueError as error:  # all errors of dsa_rt about values are ValueErrors
        raise BundleError(f"{where}: {error}") from error
