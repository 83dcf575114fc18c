"""The calibrated rule's knowledge: what a confidence at each level is worth, measured in a calibration run.

The head's confidences differ by noise level, so a confidence after pass p is only compared with confidences
after pass p. Per level they are cut into bins of equal count, and per bin the calibration keeps the error
that the next pass removed on average, and that all remaining passes removed. Less confidence must mean more
to gain: the curves are made monotone by isotonic regression, which also takes the noise out of small bins.
How bins follow one another from pass to pass is kept as counts, from which :mod:`dsa_rt.policy.allocation`
works out how much to save for later.

Gains are measured in units of their clip's own: the mean over its later chunks. A budget is spent within one
clip, so only what differs between its chunks counts. Were a hard clip's large gains taken as they are, its
first chunks would look exceptional, and the budget would be gone before its equally hard last ones: on clips
that differ, that loses to plain "4, then 2" however good the head is.

The first chunk is another population (there is no context yet) and has curves of its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_rt.errors import BundleError, PolicyError
from dsa_rt.policy.allocation import Allocation
from dsa_rt.policy.records import Records

FORMAT = 1
MAX_BINS = 64
_DIGITS = 9
_CALM = 0.25  # of the mean clip's gain: a clip with so little counts half, as its relative gains are noise

Array = NDArray[np.float64]
Row = tuple[float, ...]
Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Curves:
    """Of one population of chunks, per level (levels = passes - 1; level p is after pass p, at index p - 1).

    edges [levels][bins - 1]: rising confidences; bin k holds edges[k - 1] <= confidence < edges[k].
    gain [levels][bins]: error that the next pass removes. whole [levels][bins]: that all remaining passes do.
    Both fall with k; 1.0 is what refining removes from a mean chunk of the same clip.
    """

    edges: tuple[Row, ...]
    gain: tuple[Row, ...]
    whole: tuple[Row, ...]

    def check(self, name: str, levels: int, bins: int) -> None:
        """:class:`PolicyError` where numbers or their order cannot be."""
        for part, length in (("edges", bins - 1), ("gain", bins), ("whole", bins)):
            rows = getattr(self, part)
            if [len(row) for row in rows] != [length] * levels:
                raise PolicyError(f"calibration: {name}.{part} is not {levels} rows of {length} numbers")
            order = "rising from 0 to 1" if part == "edges" else "falling to 0 or more"
            for row in rows:
                rising = row if part == "edges" else row[::-1]
                sorted_row = all(a <= b for a, b in itertools.pairwise(rising))  # False with NaN
                if not (sorted_row and rising[0] >= 0 and rising[-1] <= (1 if part == "edges" else 1e30)):
                    raise PolicyError(f"calibration: {name}.{part} is not {order}: {row}")


@dataclass(frozen=True)
class Calibration:
    """passes: scheduled passes of the calibration run. clips, chunks: its size.

    later, first: curves of all chunks but the first, and of the first. level_counts [levels - 1][bins][bins]:
    chunks in a bin after pass p (row) and after pass p + 1 (column). counts [bins]: after the first pass;
    both without first chunks. Raises :class:`PolicyError`.
    """

    passes: int
    clips: int
    chunks: int
    later: Curves
    first: Curves
    level_counts: tuple[Counts, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.passes < 2 or self.clips < 1 or self.chunks < 2:
            raise PolicyError(
                f"a calibration of {self.clips} clips, {self.chunks} chunks and {self.passes} passes; "
                "expected at least 1 clip, 2 chunks and 2 passes"
            )
        bins, levels = self.bins, self.passes - 1
        if not 2 <= bins <= MAX_BINS:
            raise PolicyError(f"a calibration of {bins} bins; expected 2 to {MAX_BINS}")
        self.later.check("later", levels, bins)
        self.first.check("first", levels, bins)
        tables = self.level_counts
        if len(tables) != levels - 1 or any([len(row) for row in table] != [bins] * bins for table in tables):
            raise PolicyError(f"calibration: level_counts are not {levels - 1} tables of {bins} x {bins}")
        if len(self.counts) != bins or sum(self.counts) < 1:
            raise PolicyError(f"calibration: counts are not {bins} numbers, some above 0")
        if any(not 0 <= count < 1 << 40 for row in (self.counts, *itertools.chain(*tables)) for count in row):
            raise PolicyError("calibration: a count is not 0 or more")

    @property
    def bins(self) -> int:
        return len(self.later.gain[0]) if self.later.gain else 0

    @cached_property
    def by_pass(self) -> Allocation:
        """Thresholds where every pass is a decision of its own."""
        return self._allocation(self.later.gain, self.first.gain, self.level_counts)

    @cached_property
    def by_chunk(self) -> Allocation:
        """Thresholds where a chunk is refined by all remaining passes or not at all."""
        return self._allocation(self.later.whole[:1], self.first.whole[:1], ())

    def _allocation(
        self, later: tuple[Row, ...], first: tuple[Row, ...], levels: tuple[Counts, ...]
    ) -> Allocation:
        return Allocation.solve(
            np.array(later), np.array(first), [np.array(table) for table in levels], np.array(self.counts)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; "levels" by pass: rising confidences (the bins' edges) and the bins' gains."""
        return {
            "format": FORMAT,
            "passes": self.passes,
            "clips": self.clips,
            "chunks": self.chunks,
            "levels": _curves_dict(self.later),
            "first_levels": _curves_dict(self.first),
            "level_counts": [[list(row) for row in table] for table in self.level_counts],
            "counts": list(self.counts),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """Strict inverse of :meth:`to_dict`; :class:`BundleError` that says what is wrong."""
        try:
            if data["format"] != FORMAT:
                raise BundleError(
                    f"calibration has format {data['format']!r}; this dsa_rt reads {FORMAT}: calibrate again"
                )
            passes = _int(data["passes"])
            return cls(
                passes,
                _int(data["clips"]),
                _int(data["chunks"]),
                _curves(data["levels"], passes),
                _curves(data["first_levels"], passes),
                tuple(_counts(table) for table in data["level_counts"]),
                tuple(_int(count) for count in data["counts"]),
            )
        except PolicyError as error:
            raise BundleError(f"{error}; calibrate again") from error
        except KeyError as error:
            raise BundleError(f"calibration: {error} is missing; calibrate again") from error
        except (TypeError, OverflowError) as error:
            raise BundleError(
                f"calibration: a value is not of the expected kind ({error}); calibrate again"
            ) from error


def fit_calibration(records: Records, bins: int | None = None) -> Calibration:
    """Curves and counts of a calibration run; bins: 2 to 64, None: 24 chunks a bin, at most 16 bins.

    :class:`PolicyError` where refining removes no error, so that there is nothing to decide.
    """
    gain = records.gain()
    removable = float(gain[:, 1:, -1].sum())
    if removable <= 0:
        raise PolicyError(
            "the last pass of the calibration run leaves as much error as the first "
            f"(difference {removable:.3g}): refining removes nothing, so use policy fixed-1, "
            "or check how error was measured"
        )
    if bins is None:
        bins = min(max(records.clips * (records.chunks - 1) // 24, 2), 16)
    if not 2 <= bins <= MAX_BINS:
        raise PolicyError(f"{bins} bins; expected 2 to {MAX_BINS}")
    unit = np.maximum(gain[:, 1:, -1].mean(1), 0.0)
    weight = unit / (unit + _CALM * unit.mean())
    gain = gain / np.where(unit > 0, unit, 1.0)[:, None, None]
    later, later_bins = _fit_curves(records.confidence[:, 1:], gain[:, 1:], weight, bins)
    first, _ = _fit_curves(records.confidence[:, :1], gain[:, :1], weight, bins)
    levels = records.passes - 1
    level_counts = tuple(_count(later_bins[..., p], later_bins[..., p + 1], bins) for p in range(levels - 1))
    counts = tuple(np.bincount(later_bins[..., 0].ravel(), minlength=bins).tolist())
    return Calibration(records.passes, records.clips, records.chunks, later, first, level_counts, counts)


def monotone(values: Array, weights: Array) -> Array:
    """The falling sequence nearest to ``values`` [n] in weighted squares, by pooling adjacent violators.

    Values of no weight take the value of what stands before them (after them, at the start).
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        length = 1
        while blocks and (weight == 0 or blocks[-1][1] == 0 or blocks[-1][0] < value):
            mean, before, count = blocks.pop()
            total = before + weight
            value = (mean * before + value * weight) / total if total else 0.0
            weight, length = total, length + count
        blocks.append((value, weight, length))
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks])


def _fit_curves(confidence: Array, gain: Array, weight: Array, bins: int) -> tuple[Curves, NDArray[np.int64]]:
    """Curves of chunks [clips, chunks, passes] of clips weighted [clips]; each chunk's bin by level."""
    levels = confidence.shape[-1] - 1
    weight = np.broadcast_to(weight[:, None], confidence.shape[:2]).ravel()
    index = np.empty((*confidence.shape[:2], levels), np.int64)
    rows: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for p in range(levels):
        values = confidence[..., p]
        edges = _row(np.quantile(values, np.arange(1, bins) / bins))
        index[..., p] = np.searchsorted(edges, values, side="right")
        weights = np.bincount(index[..., p].ravel(), weight, minlength=bins).astype(np.float64)
        rows[0].append(edges)
        for out, end in ((rows[1], p + 1), (rows[2], levels)):
            removed = weight * (gain[..., end] - gain[..., p]).ravel()
            sums = np.bincount(index[..., p].ravel(), removed, minlength=bins)
            means = np.divide(sums, weights, out=np.zeros(bins), where=weights > 0)
            # A pass that adds error on average is worth nothing; it is still taken when budget is left over.
            out.append(_row(np.maximum(monotone(means, weights), 0.0)))
    return Curves(*map(tuple, rows)), index


def _row(values: Array) -> Row:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values.tolist())


def _count(rows: NDArray[np.int64], columns: NDArray[np.int64], bins: int) -> Counts:
    table = np.bincount((rows * bins + columns).ravel(), minlength=bins * bins).reshape(bins, bins)
    return tuple(tuple(row) for row in table.tolist())


def _curves_dict(curves: Curves) -> dict[str, Any]:
    rows = zip(curves.edges, curves.gain, curves.whole, strict=True)
    return {
        str(p): {"confidence": list(edges), "gain": list(gain), "gain_of_all": list(whole)}
        for p, (edges, gain, whole) in enumerate(rows, 1)
    }


def _curves(data: Any, passes: int) -> Curves:
    if len(data) != passes - 1 or set(data) != {str(p) for p in range(1, passes)}:
        raise BundleError(
            f"calibration: levels are {sorted(data)[:9]}; expected 1 to {passes - 1}; calibrate again"
        )
    return Curves(
        *(
            tuple(_floats(data[str(p)][key]) for p in range(1, passes))
            for key in ("confidence", "gain", "gain_of_all")
        )
    )


def _floats(values: Any) -> Row:
    if not all(type(value) in (int, float) for value in values):
        raise BundleError(
            f"calibration: {str(values)[:60]} has members that are not numbers; calibrate again"
        )
    return tuple(float(value) for value in values)


def _counts(table: Any) -> Counts:
    return tuple(tuple(_int(count) for count in row) for row in table)


def _int(value: Any) -> int:
    if type(value) is not int:
        raise BundleError(f"calibration: {value!r} is not a whole number; calibrate again")
    return value
