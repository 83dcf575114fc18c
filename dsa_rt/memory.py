"""The memory plan of a compiled generation: worked out from sizes, before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dsa_rt.errors import MemoryLimitError, OptionError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a generation takes on the device, beside the interpreter and torch themselves.

    weights: generators, head, codec, text and image encoder, packed layers too. kv_cache: self- and cross-attention K/V
    of all sessions; under HSA those that outlive a step, and one layer's scratch. activations: the largest live set
    inside one pass, of an autoregressive run all working buffers of its engine.
    decode: the working set of the codec and one chunk of frames. output: frames and latents of a whole clip, as
    ``generate`` returns them (``stream`` holds a chunk at a time). velocities: rows of a many-step run: latents,
    conditions, and cached and fresh velocities.

    host: bytes of page-locked host memory beside a CUDA device. storage: of K/V between steps, one of
    :data:`dsa_rt.sync.STORAGES`; held: whether compile makes all buffers, which then stay, or a many-step run makes
    them for each clip and has let go of them when it decodes; reason: why these, where the planner chose. live: the
    most of all parts but the weights that is there at one time. None: all.
    """

    weights: int
    kv_cache: int
    activations: int
    decode: int
    output: int
    velocities: int = 0
    host: int = 0
    storage: str = "model"
    held: bool = True
    reason: str = ""
    live: int | None = None

    @property
    def total(self) -> int:
        """What the run takes at its peak."""
        if self.live is not None:
            return self.weights + self.live
        return self.weights + self.kv_cache + self.activations + self.decode + self.output + self.velocities

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in bytes."""
        return asdict(self) | {"total": self.total}

    def table(self) -> str:
        """One line per part, for people."""
        parts = {"weights": self.weights, "K/V cache": self.kv_cache, "velocities": self.velocities,
                 "activations": self.activations, "decode": self.decode, "output": self.output}  # fmt: skip
        parts = {name: size for name, size in parts.items() if size or name != "velocities"} | {"peak": self.total}
        lines = [f"{name:<12}{size / 1e6:10.1f} MB" for name, size in parts.items()]
        if self.host:
            lines.append(f"{'host memory':<12}{self.host / 1e6:10.1f} MB")
        if self.storage != "model" or not self.held or self.reason:
            lines.append(f"K/V storage {self.manner}{f' ({self.reason})' if self.reason else ''}")
        return "\n".join(lines)

    @property
    def manner(self) -> str:
        """How K/V and other buffers are kept, in words."""
        return self.storage if self.held else f"{self.storage}, buffers made for each clip"

    def check(self, limit: int | None, device: torch.device) -> None:
        """:class:`MemoryLimitError` when the plan passes the user's limit or what is free on the device now."""
        choose([self], limit, device)

    def shortage(self, limit: int | None, device: torch.device, *, here: bool = True) -> str | None:
        """The bound that the plan passes, in words; None where it fits. here: whether what is free now counts too,
        beside the weights, which are loaded already."""
        if limit is not None and self.total > limit:
            return f"the memory limit is {limit / 1e6:.1f} MB"
        if not here:
            return None
        free = free_memory(device)
        if free is not None and self.total - self.weights > free:
            return f"the free memory of {device} is {free / 1e6:.1f} MB{' beside the weights' if self.weights else ''}"
        free = free_memory(torch.device("cpu")) if self.host else None
        if free is not None and self.host > free:
            return f"the free host memory is {free / 1e6:.1f} MB"
        return None


_REMEDIES = {
    "kv_cache": "a smaller window, or with HSA kv_storage='fp8', fewer frames or policy='dense'",
    "velocities": "fewer frames, or a smaller height or width",
    "activations": "a smaller height or width",
    "output": "fewer frames, or stream() in place of a whole clip",
    "decode": "a smaller height or width",
    "weights": "dtype='bf16' or a smaller bundle",
}


def choose(
    plans: Sequence[MemoryPlan], limit: int | None, device: torch.device, *, here: bool = True
) -> MemoryPlan:
    """The first plan that fits the limit and, where it runs ``here``, what is free now; its reason says what was wrong
    with those before it. Plans of one run differ in how K/V are kept. :class:`MemoryLimitError` where none fits."""
    refused: list[tuple[MemoryPlan, str]] = []
    for plan in plans:
        fault = plan.shortage(limit, device, here=here)
        if fault is None:
            said = [f"{other.manner} would take {_needs(other)}, but {why}" for other, why in refused]
            return replace(plan, reason="; ".join(said) or ("it fits" if len(plans) > 1 else ""))
        refused.append((plan, fault))
    least, fault = min(refused, key=lambda pair: pair[0].total)
    each = "; ".join(f"{plan.manner}: {_needs(plan)}" for plan in plans)
    needs = _needs(least) + (f" (with K/V storage {each})" if len(plans) > 1 else "")
    largest = max(_REMEDIES, key=lambda name: getattr(least, name))
    raise MemoryLimitError(
        f"this needs {needs}, but {fault}. The largest part is {largest} with {getattr(least, largest) / 1e6:.1f} MB: "
        f"{_REMEDIES[largest]} lowers it"
    )


def _needs(plan: MemoryPlan) -> str:
    host = f" and {plan.host / 1e6:.1f} MB of host memory" if plan.host else ""
    return f"{plan.total / 1e6:.1f} MB{host}"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on the device now; None where the system does not say. What torch keeps for reuse on a
    CUDA device can be taken."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as info:
            kib = re.search(r"^MemAvailable:\s+(\d+) kB", info.read(), re.MULTILINE)
    except OSError:
        return None
    return int(kib[1]) * 1024 if kib else None


def parse_bytes(value: int | str | None) -> int | None:
    """A size in bytes from a number or text such as "2GB", "512 MiB"; None stays None."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", str(value).lower())
    size = 0.0
    if match:
        unit = match[2] if match[2].endswith("b") or not match[2] else match[2] + "b"
        size = float(match[1]) * _UNITS.get(unit, 0)
    if size < 1:
        raise OptionError(f"memory limit {value!r} is not a size; expected bytes or text such as '2GB' or '512MiB'")
    return int(size)
