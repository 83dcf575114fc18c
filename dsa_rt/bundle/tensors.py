"""safetensors files: a strict check of the header from plain reads, and a writer that hashes as it goes.

The check comes before the file is mapped: a header cannot make us read more than MAX_JSON_BYTES, and
afterwards every tensor is known to lie inside the file, side by side with its neighbours.
Layout: 8 bytes little-endian header length, the header (JSON: name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dsa_rt.bundle.strict import DAMAGED, MAX_JSON_BYTES, load_json, short
from dsa_rt.errors import BundleError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64  # of the first tensor: a cache line


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as its header describes it; file is relative to the bundle."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.dtype.itemsize


def read_header(stream: BinaryIO, size: int, file: str) -> dict[str, TensorEntry]:
    """Entries by tensor name of an open safetensors file of `size` bytes. Errors name file and tensor."""
    if size < 8:
        raise BundleError(f"{file} is {size} bytes long, too short for a safetensors header; {DAMAGED}")
    length = int.from_bytes(stream.read(8), "little")
    if length > min(size - 8, MAX_JSON_BYTES):
        raise BundleError(
            f"{file} claims a header of {length} bytes; expected at most {min(size - 8, MAX_JSON_BYTES)} "
            f"in a file of {size}; {DAMAGED}"
        )
    where = f"the header of {file}"
    text = stream.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise BundleError(f"{where} is not a JSON object; {DAMAGED}")
    header = load_json(text, where)
    _check_metadata(header.pop("__metadata__", {}), where)
    ranges = []
    entries = {}
    for name, fields in header.items():
        entries[name], begin, end = _check_tensor(name, fields, file)
        ranges.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin != expected:
            fault = "overlaps another tensor" if begin < expected else "leaves a gap before it"
            raise BundleError(
                f"{file}: tensor {short(name)} {fault} (starts at byte {begin}, not {expected}); {DAMAGED}"
            )
        expected = end
    if expected != size - 8 - length:
        raise BundleError(
            f"{file}: its header describes {expected} bytes of tensors, it has {size - 8 - length}; {DAMAGED}"
        )
    return entries


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BundleError(
            f"{where}: __metadata__ is {short(metadata)}; expected an object of text; {DAMAGED}"
        )


def _check_tensor(name: str, fields: Any, file: str) -> tuple[TensorEntry, int, int]:
    where = f"{file}: tensor {short(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise BundleError(f"{where} is {short(fields)}; expected dtype, shape and data_offsets; {DAMAGED}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BundleError(f"{where} has dtype {short(dtype)}; export it as one of {', '.join(DTYPES)}")
    if not _whole(shape) or len(shape) > 16 or not all(size > 0 for size in shape):
        raise BundleError(f"{where} has shape {short(shape)}; expected positive sizes, 16 at most; {DAMAGED}")
    if not _whole(offsets) or len(offsets) != 2 or not 0 <= offsets[0] < offsets[1]:
        raise BundleError(
            f"{where} has data_offsets {short(offsets)}; expected [begin, end] with begin < end; {DAMAGED}"
        )
    entry = TensorEntry(file, DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != entry.nbytes:
        raise BundleError(
            f"{where} has {offsets[1] - offsets[0]} bytes of data; "
            f"{dtype} of shape {entry.shape} needs {entry.nbytes}; {DAMAGED}"
        )
    return entry, offsets[0], offsets[1]


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def check_writable(name: object, tensor: object, where: str) -> None:
    """Raises BundleError unless a bundle can hold the tensor and would be accepted with it."""
    label = f"{where}: tensor {short(name)}"
    if not isinstance(name, str) or not name or name == "__metadata__":
        raise BundleError(f"{label}: expected a name that is text, not empty and not __metadata__")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise BundleError(f"{label} is {short(tensor)}; expected a dense tensor that holds data")
    if tensor.dtype not in _NAMES:
        raise BundleError(
            f"{label} has dtype {tensor.dtype}; expected {', '.join(map(str, _NAMES))}: convert it first"
        )
    if tensor.numel() == 0:
        raise BundleError(f"{label} is empty (shape {tuple(tensor.shape)}); leave it out")
    if not is_finite(tensor):
        raise BundleError(
            f"{label} holds NaN or Inf, so it is not worth keeping: export an earlier checkpoint"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; takes no memory of its size (NaN passes through min and max)."""
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], advance: Callable[[int], None]
) -> tuple[str, int]:
    """Writes a new safetensors file -> (SHA-256 in hex, bytes). Copies one tensor at a time to the host.

    advance: called with the bytes of each tensor written.  Raises OSError.
    """
    entries = {name: TensorEntry("", tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return stream_tensors(path, entries, tensors.__getitem__, advance)


def stream_tensors(
    path: Path,
    entries: Mapping[str, TensorEntry],
    read: Callable[[str], Tensor],
    advance: Callable[[int], None],
) -> tuple[str, int]:
    """write_tensors for tensors that are not there yet: `read` gives each, once, as `entries` describe it."""
    # Wide dtypes first, so that every tensor is aligned to its own element size.
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        entry = entries[name]
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with open(path, "xb") as stream:
        for block in (len(text).to_bytes(8, "little"), text):
            stream.write(block)
            digest.update(block)
        for name in order:
            flat = read(name).detach().to("cpu").contiguous().reshape(-1)
            data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            if len(data) != entries[name].nbytes:
                raise ValueError(f"tensor {name!r} has {len(data)} bytes, expected {entries[name].nbytes}")
            stream.write(data)
            digest.update(data)
            advance(len(data))
            del flat, data  # before the next one is read
    return digest.hexdigest(), 8 + len(text) + offset
