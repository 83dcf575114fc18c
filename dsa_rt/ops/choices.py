"""Which backend was measured to be the fastest, as data: ``choices.json``, which ``python -m bench.choices`` writes.

The table does not say what can serve a call, :mod:`dsa_rt.ops.backend` does. Of those that can, the one that a row
names comes first.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_rt.errors import OptionError

PATH = Path(__file__).with_name("choices.json")

_ROWS = {"active": (0, 1), "dim": (0, 2)}
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "philox_normal": _ROWS,
    "renoise": _ROWS,
    "cached_step": {"active": (4, 1), "cached": (0, 1), "dim": (0, 2)},
    "exit_decision": {},
    "norm_modulate": _ROWS,
    "residual_norm_modulate": _ROWS,
    "rms_norm": _ROWS,
    "qk_norm_rope_store": {"active": (0, 1), "cached": (1, 1), "dim": (0, 3)},
    "active_attention": {"active": (2, 1), "cached": (3, 1), "dim": (2, 3)},
    "gather_rows": {"active": (0, 1), "cached": (1, 1), "dim": (0, -1)},
    "scatter_rows": {"active": (2, 1), "cached": (0, 1), "dim": (0, -1)},
    "quantize_rows": {"active": (2, 1), "dim": (2, 3)},
    "confidence_pool": {"active": (4, 1), "dim": (4, 2)},
}
"""Op -> name of a size -> where a call has it: the argument's place in the schema, the dimension."""

_ARGUMENTS = {op: tuple({argument for argument, _ in sizes.values()}) for op, sizes in SIZES.items()}

Bounds = tuple[int, int]
Movable = Mapping[tuple[str, str], Sequence[str]]
"""(op, device type) -> the backends whose order is left to what was measured."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured choice: for calls of ``op`` on ``device`` in ``dtype`` whose sizes lie in the bounds, both included.

    device: a CUDA compute capability, "9.0", or "cpu". dtype: of the rows, as torch names it. active: tokens A; cached:
    rows N of the cache or the full sequence; dim: the last dimension, D of heads, else channels; None: any. backend:
    the fastest; next: the second; ratio: the time of the second by the first's, the least of what was measured inside
    the bounds. date, machine, commit, source: of the measurement and the file that holds it.
    """

    op: str
    device: str
    dtype: str
    active: Bounds | None
    cached: Bounds | None
    dim: Bounds | None
    backend: str
    next: str
    ratio: float
    date: str
    machine: str
    commit: str
    source: str

    def covers(self, call: Sequence[Any]) -> bool:
        """Whether the sizes of a call, its arguments in the order of the schema, lie in the bounds."""
        for name, (argument, dimension) in SIZES[self.op].items():
            bounds: Bounds | None = getattr(self, name)
            if bounds is not None and not bounds[0] <= call[argument].shape[dimension] <= bounds[1]:
                return False
        return True

    def where(self) -> str:
        """The bounds in words; "" where there are none."""
        names = (("A", self.active), ("N", self.cached), ("dim", self.dim))
        return ", ".join(f"{name} {b[0]} to {b[1]}" if b[0] < b[1] else f"{name} {b[0]}" for name, b in names if b)

    def why(self) -> str:
        return f"measured: {self.ratio:.2f} times as fast as {self.next}, {self.date}, {self.machine}"


Table = dict[str, dict[tuple[str, str, torch.dtype], tuple[Row, ...]]]
"""Device type -> (op, device, dtype) -> rows. A device type without rows is not in it."""


@cache
def device_of(place: torch.device) -> str:
    """A device as rows name it."""
    if place.type != "cuda":
        return place.type
    return ".".join(map(str, torch.cuda.get_device_capability(place)))


def find(table: Table, op: str, decides: Tensor, call: Sequence[Any]) -> Row | None:
    """The row for a call, its arguments in the order of the schema; device and dtype of ``decides`` count. None too for
    a call that is malformed: its check says what is wrong."""
    rows = of(table, op, decides.device, decides.dtype)
    try:
        return next((row for row in rows if row.covers(call)), None)
    except (AttributeError, IndexError):
        return None


def shapes(op: str, call: Sequence[Any]) -> tuple[object, ...]:
    """The shapes of a call that :func:`find` looks at; None for what is no tensor."""
    return tuple(getattr(call[argument], "shape", None) for argument in _ARGUMENTS.get(op, ()))


def of(table: Table, op: str, place: torch.device, dtype: torch.dtype) -> tuple[Row, ...]:
    """The rows of an op for a device and dtype."""
    rows = table.get(place.type)
    return rows.get((op, device_of(place), dtype), ()) if rows else ()


def index(rows: Iterable[Row]) -> Table:
    """Rows by what is asked first."""
    table: Table = {}
    for row in rows:
        places = table.setdefault(_type(row.device), {})
        key = (row.op, row.device, getattr(torch, row.dtype))
        places[key] = (*places.get(key, ()), row)
    return table


def read(path: Path, movable: Movable) -> list[Row]:
    """The rows of a file; :class:`dsa_rt.errors.OptionError` that names row and field where it is wrong."""
    return parse(path.read_text(encoding="utf-8"), path.name, movable)


def parse(text: str, name: str, movable: Movable) -> list[Row]:
    """``{"rows": [...]}``, each with the fields of :class:`Row`, no two for one call. name: of the file."""
    try:
        made = json.loads(text, object_pairs_hook=_members, parse_constant=_refuse)
    except ValueError as error:
        raise OptionError(f"{name} is not valid JSON ({error}); write it with python -m bench.choices") from error
    if not isinstance(made, dict) or set(made) != {"rows"} or not isinstance(made["rows"], list):
        raise OptionError(f'{name} is expected to hold {{"rows": [...]}} and nothing else')
    rows: list[Row] = []
    for number, fields in enumerate(made["rows"]):
        try:
            row = _row(fields, movable)
            for earlier, other in enumerate(rows):
                if _meet(row, other):
                    raise ValueError(f"bounds are also in row {earlier}, expected one row for a call")
        except ValueError as error:
            op = f" ({fields['op']})" if isinstance(fields, dict) and isinstance(fields.get("op"), str) else ""
            raise OptionError(f"{name}: row {number}{op}: {error}") from None
        rows.append(row)
    return rows


def written(rows: Iterable[Row]) -> str:
    """The text that :func:`parse` reads, a row a line."""
    lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rows)
    return '{"rows": [' + ",".join(f"\n{line}" for line in lines) + "\n]}\n"


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key appears twice")
    return made


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _type(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def _row(fields: Any, movable: Movable) -> Row:
    """A row, or ValueError that names the field."""
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r}, expected an object")
    known = [field.name for field in dataclasses.fields(Row)]
    if set(fields) != set(known):
        faults = [f"no {key}" for key in known if key not in fields] + [f"{k!r}" for k in fields if k not in known]
        raise ValueError(f"has {', '.join(faults)}; expected {', '.join(known)}")

    def expect(name: str, right: Callable[[Any], bool], what: str) -> None:
        if not right(fields[name]):
            raise ValueError(f"{name} is {fields[name]!r}, expected {what}")

    expect("op", lambda op: op in SIZES if isinstance(op, str) else False, f"one of {', '.join(SIZES)}")
    op = fields["op"]
    expect("device", lambda x: isinstance(x, str) and bool(re.fullmatch(r"cpu|\d+\.\d", x)),
           'a compute capability like "9.0", or "cpu"')  # fmt: skip
    expect("dtype", lambda x: isinstance(x, str) and isinstance(getattr(torch, x, None), torch.dtype),
           'the name of a dtype of torch, like "bfloat16"')  # fmt: skip
    for name in ("active", "cached", "dim"):
        if name in SIZES[op]:
            expect(name, lambda x: x is None or _is_bounds(x), "null, or [first, last] with 0 < first <= last")
        else:
            expect(name, lambda x: x is None, f"null: {op} has no such size")
    device = fields["device"]
    order = movable.get((op, _type(device)), ())
    if not order:
        raise ValueError(f"device is {device!r}, where the order of the backends is fixed: no row may change it")
    expect("backend", lambda x: x in order, f"one of {', '.join(order)}")
    expect("next", lambda x: x in order and x != fields["backend"], f"another one of {', '.join(order)}")
    expect("ratio", lambda x: type(x) in (int, float) and math.isfinite(x) and x >= 1, "a number of 1 or more")
    expect("date", _is_date, 'a day like "2026-11-21"')
    for name in ("machine", "commit", "source"):
        expect(name, lambda x: isinstance(x, str) and bool(x.strip()), "text")
    bounds = {name: tuple(fields[name]) for name in ("active", "cached", "dim") if fields[name] is not None}
    return Row(**(fields | bounds))


def _is_bounds(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)
    return whole and 0 < value[0] <= value[1]


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _meet(row: Row, other: Row) -> bool:
    """Whether a call can be in the bounds of both."""
    if (row.op, row.device, row.dtype) != (other.op, other.device, other.dtype):
        return False
    pairs = ((row.active, other.active), (row.cached, other.cached), (row.dim, other.dim))
    return all(a is None or b is None or (a[0] <= b[1] and b[0] <= a[1]) for a, b in pairs)
