"""Published weights, tensor by tensor: safetensors (one file, or shards with or without an index) and torch files.

Opening reads headers only; ``read`` maps one tensor. Nothing is unpickled but tensors and plain containers.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsa_rt.bundle.strict import DAMAGED, MAX_JSON_BYTES, load_json, short
from dsa_rt.bundle.tensors import TensorEntry, read_header
from dsa_rt.errors import BundleError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_AGAIN = "the file is damaged or not whole: download it again"


class Source(Protocol):
    """Tensors by their published names. entries: what is known without reading; files: where they lie."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self, name: str) -> Tensor:
        """One tensor on the host; it may be a view of the mapped file."""
        ...


@dataclass(frozen=True)
class SafetensorsSource:
    """Safetensors files whose tensors belong together. An entry's ``file`` is the path of its file."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        file = self.entries[name].file
        try:
            with safe_open(file, framework="pt", device="cpu") as mapped:
                tensor: Tensor = mapped.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{file} cannot be read: {error}; {_AGAIN}") from error
        return tensor


@dataclass(frozen=True)
class TorchSource:
    """Tensors of a torch file, mapped: they are read from disk when they are used. Made by :func:`torch_source`."""

    tensors: Mapping[str, Tensor]
    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def open_safetensors(path: Path) -> SafetensorsSource:
    """A safetensors file, or a folder that holds the weights of one model.

    In a folder an index names the shards; without one there is one file, or a whole set of numbered ones. BundleError
    names shards that are missing, and the files where it is not clear which to take.
    """
    if path.is_file():
        return _joined([path])
    index = sorted(path.glob("*.safetensors.index.json"))
    if len(index) > 1:
        raise BundleError(f"'{path}' has several models: {_list(index)}; leave one, or name a file")
    if index:
        return _indexed(index[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        torch_files = sorted(file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES)
        found = f"; it has {_list(torch_files)}, which is pickled: get the safetensors version" if torch_files else ""
        raise BundleError(f"the folder '{path}' has no .safetensors file{found}")
    if len(files) == 1 and not _NUMBERED.fullmatch(files[0].name):
        return _joined(files)
    return _numbered(path, files)


def _indexed(index: Path) -> SafetensorsSource:
    with open(index, "rb") as stream:
        value = load_json(stream.read(MAX_JSON_BYTES + 1), str(index))
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BundleError(f"{index} has no weight_map of tensor names to files; {_AGAIN}")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise BundleError(f"{index} names the file {short(name)}; expected a .safetensors file beside it")
    _require_files(index.parent, names)
    source = _joined([index.parent / name for name in names])
    for tensor, file in weight_map.items():
        if tensor not in source.entries or Path(source.entries[tensor].file).name != file:
            raise BundleError(f"{index} says that {file} has tensor {short(tensor)}, which it has not; {_AGAIN}")
    return source


def _numbered(path: Path, files: list[Path]) -> SafetensorsSource:
    parts = [_NUMBERED.fullmatch(file.name) for file in files]
    sets = {(part[1], part[3]) for part in parts if part is not None}
    if len(sets) != 1 or None in parts:
        raise BundleError(f"'{path}' has several models: {_list(files)}; leave one, or name a file")
    (stem, count), digits = sets.pop(), len(parts[0][2]) if parts[0] else 5
    names = [f"{stem}-{number:0{digits}d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    _require_files(path, names)
    return _joined([path / name for name in names])


def _require_files(folder: Path, names: list[str]) -> None:
    absent = [Path(name) for name in names if not (folder / name).is_file()]
    if absent:
        raise BundleError(
            f"'{folder}' lacks {len(absent)} of {len(names)} shards: {_list(absent)}; download them and try again"
        )


def _joined(files: list[Path]) -> SafetensorsSource:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        try:
            with open(file, "rb") as stream:
                found = read_header(stream, file.stat().st_size, str(file))
        except BundleError as error:
            raise BundleError(str(error).replace(DAMAGED, _AGAIN)) from error
        except OSError as error:
            raise BundleError(f"{file} cannot be read: {error.strerror or error}; check its permissions") from error
        if doubled := next((name for name in found if name in entries), None):
            raise BundleError(f"tensor {short(doubled)} is in {entries[doubled].file} and in {file}; leave one")
        entries |= found
    return SafetensorsSource(entries, tuple(files))


def torch_source(tensors: Mapping[str, Tensor], file: Path) -> TorchSource:
    """Tensors that :func:`open_torch` found in a file."""
    entries = {name: TensorEntry(str(file), t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return TorchSource(tensors, entries, (file,))


def open_torch(path: Path) -> Any:
    """What a torch file holds: nested dicts, lists and mapped tensors. BundleError for any other object in it."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # without torch's advice to open it all the same
        raise BundleError(
            f"'{path}' holds Python objects that are not tensors{f' ({short(found[1])})' if found else ''} and was not "
            "opened, as they could run code; save its tensors alone with torch.save"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        raise BundleError(
            f"'{path}' is not a whole torch file ({' '.join(str(error).split())[:200]}); download it again, or save it "
            "with torch 1.6 or later"
        ) from error
    except OSError as error:
        raise BundleError(f"'{path}' cannot be read: {error.strerror or error}; check the path") from error


def _list(files: list[Path]) -> str:
    more = f" and {len(files) - 6} more" if len(files) > 6 else ""
    return ", ".join(file.name for file in files[:6]) + more
