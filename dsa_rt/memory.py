"""The memory plan of a compiled generation: worked out from sizes, before anything is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from dsa_rt.errors import MemoryLimitError, OptionError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a generation takes beside the interpreter and torch themselves.

    weights: generator, head, codec and text encoder. kv_cache: self- and cross-attention K/V of one session.
    activations: the largest live set inside one pass. decode: the decoder's working set and one chunk of frames.
    output: frames and latents of a whole clip, as ``generate`` returns them (``stream`` holds a chunk at a time).
    """

    weights: int
    kv_cache: int
    activations: int
    decode: int
    output: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.decode + self.output

    def table(self) -> str:
        """One line per part, for people."""
        parts = {"weights": self.weights, "K/V cache": self.kv_cache, "activations": self.activations,
                 "decode": self.decode, "output": self.output, "total": self.total}  # fmt: skip
        return "\n".join(f"{name:<12}{size / 1e6:10.1f} MB" for name, size in parts.items())

    def check(self, limit: int | None, device: torch.device) -> None:
        """:class:`MemoryLimitError` when the plan passes the user's limit or what is free on the device now."""
        bounds = [(limit, "the memory limit"), (free_memory(device), f"the free memory of {device}")]
        for bound, what in bounds:
            if bound is not None and self.total > bound:
                parts = {"kv_cache": "a smaller window", "activations": "a smaller height or width",
                         "output": "fewer frames, or stream() in place of a whole clip",
                         "decode": "a smaller height or width",
                         "weights": "dtype='bf16' or a smaller bundle"}  # fmt: skip
                largest = max(parts, key=lambda name: getattr(self, name))
                raise MemoryLimitError(
                    f"this needs {self.total / 1e6:.1f} MB, but {what} is {bound / 1e6:.1f} MB. The largest part is "
                    f"{largest} with {getattr(self, largest) / 1e6:.1f} MB: {parts[largest]} lowers it"
                )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on the device now; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
