"""Opening a bundle: everything that can be checked is, before a tensor takes memory."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsa_rt.bundle.manifest import MANIFEST, FileEntry, Manifest, Part
from dsa_rt.bundle.strict import DAMAGED, MAX_JSON_BYTES, load_json, parse, short
from dsa_rt.bundle.tensors import TensorEntry, is_finite, read_header
from dsa_rt.errors import BundleError

# Component -> its file without suffix.
COMPONENTS = {
    "generator": "generator",
    "generator_2": "generator_2",
    "confidence_head": "confidence_head",
    "codec": "codec/model",
    "text_encoder": "text_encoder/model",
    "image_encoder": "image_encoder/model",
}
# Files that are handed to the library that understands them, unread: name -> path.
ASSETS = {"tokenizer": "tokenizer/tokenizer.json"}
MAX_ASSET_BYTES = 64 << 20  # UMT5's tokenizer has 16 MiB
_BLOCK = 4 << 20  # bytes read at a time when hashing

T = TypeVar("T")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. tensors: what the headers say, by component and name; no tensor is in memory yet."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, Mapping[str, TensorEntry]]
    hashes_verified: bool

    def __post_init__(self) -> None:
        if not self.tensors.get("generator"):
            raise BundleError("the bundle has no generator.safetensors; export it again")
        if (self.manifest.confidence_head is None) == bool(self.tensors.get("confidence_head")):
            raise BundleError(
                f"{MANIFEST} and the files disagree on whether there is a confidence_head; "
                "export the bundle again"
            )
        if (self.manifest.boundary is None) == bool(self.tensors.get("generator_2")):
            raise BundleError(
                f"{MANIFEST} and the files disagree on whether there are two experts (boundary and generator_2); "
                "export the bundle again"
            )

    def config(self, section: str, kind: type[T]) -> T:
        """A section of the manifest as its owner's dataclass: no key missing, unknown or of another type.

        section: "architecture", "confidence_head", "codec", "text_encoder" or "image_encoder". The section's own
        "kind", by which the caller chose the class, is left out. Raises BundleError, also for what the class refuses.
        """
        value = getattr(self.manifest, section)
        with _blame(self.path):
            if isinstance(value, Part):
                return parse(kind, value.config, f"{MANIFEST}: {section}: config")
            if value is None:
                remedy = "train or choose" if section == "confidence_head" else "export"
                raise BundleError(f"it has no {section}; {remedy} one that has")
            value = {key: member for key, member in value.items() if key != "kind"}
            return parse(kind, value, f"{MANIFEST}: {section}")

    def expect(self, component: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises BundleError unless the component has exactly these tensors in these shapes."""
        present = self.tensors.get(component, {})
        files = {entry.file for entry in present.values()}
        file = files.pop() if len(files) == 1 else f"{COMPONENTS[component]}.safetensors"

        def label(name: str) -> str:
            return short(name) if present[name].file == file else f"{short(name)} (in {present[name].file})"

        faults = [
            f"missing tensor {short(name)} {tuple(shapes[name])}" for name in shapes if name not in present
        ]
        faults += [
            f"tensor {label(name)} has shape {entry.shape}, expected {tuple(shapes[name])}"
            for name, entry in present.items()
            if name in shapes and entry.shape != tuple(shapes[name])
        ]
        faults += [
            f"surplus tensor {label(name)} {entry.shape}"
            for name, entry in present.items()
            if name not in shapes
        ]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise BundleError(
                f"bundle '{self.path}': {file} does not fit {MANIFEST}: {'; '.join(faults[:5])}{more}. "
                "Export the bundle again from a matching checkpoint"
            )

    def read_asset(self, name: str) -> bytes:
        """A whole file that is no tensors, by its name in ASSETS; BundleError where it is missing or has changed."""
        path = ASSETS[name]
        entry = next((entry for entry in self.manifest.files if entry.path == path), None)
        with _blame(self.path):
            if entry is None:
                raise BundleError(f"it has no {path}; export it again with one")
            with _open_entry(self.path, entry) as stream:
                data = stream.read(entry.bytes)
            if self.hashes_verified and hashlib.sha256(data).hexdigest() != entry.sha256:
                raise BundleError(f"{path} changed since the bundle was opened; open it again")
        return data

    def load(
        self, component: str, device: str | torch.device, dtype: torch.dtype, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """The component's tensors on `device`: floating-point ones in `dtype`, integers as they are.

        Read by memory map, one after the other, into memory of their own, so that a file changed later
        changes nothing here. progress: called with (bytes, bytes in all). Raises BundleError naming file and
        tensor for NaN, Inf and values that `dtype` cannot hold.
        """
        entries = self.tensors.get(component, {})
        if not entries:
            raise BundleError(f"bundle '{self.path}' has no {component}; export it again with one")
        total = sum(entry.nbytes for entry in entries.values())
        done = 0
        result: dict[str, Tensor] = {}
        for file in dict.fromkeys(entry.file for entry in entries.values()):
            with _blame(self.path, file), safe_open(self.path / file, framework="pt", device="cpu") as mapped:
                for name, entry in entries.items():
                    if entry.file == file:
                        result[name] = _place(mapped.get_tensor(name), entry, name, device, dtype)
                        done += entry.nbytes
                        if progress is not None:
                            progress(done, total)
        return result


def open_bundle(
    path: str | os.PathLike[str], verify_hashes: bool = True, progress: Progress | None = None
) -> Bundle:
    """Opens and checks a bundle; maps nothing and loads no tensor.

    verify_hashes: also read every file once and compare its SHA-256.
    progress: called while that goes on, with (bytes, bytes in all).
    Raises BundleError naming the file and tensor at fault.
    """
    root = Path(path)
    try:
        if not root.exists():
            raise BundleError(
                f"there is no bundle '{root}'; check the path, or write one with dsa_rt.export"
            )
        if not root.is_dir():
            raise BundleError(f"'{root}' is a file; a bundle is the folder that holds {MANIFEST}")
        if not os.path.lexists(root / MANIFEST):
            raise BundleError(f"the folder '{root}' has no {MANIFEST}, so it is not a bundle; check the path")
    except OSError as error:
        raise BundleError(
            f"the bundle '{root}' cannot be read: {error.strerror}; check its permissions"
        ) from error
    with _blame(root):
        return read_bundle(root, verify_hashes, progress)


def read_bundle(root: Path, verify_hashes: bool, progress: Progress | None = None) -> Bundle:
    """open_bundle on a folder with a manifest; messages name files, not the folder."""
    with _open_inside(root, MANIFEST) as stream:
        manifest = Manifest.from_json(stream.read(MAX_JSON_BYTES + 1))
    index: dict[str, Any] = {}
    headers: dict[str, dict[str, TensorEntry]] = {}
    for entry in manifest.files:  # all that is quick, first
        with _open_entry(root, entry) as stream:
            if entry.path in ASSETS.values():
                if entry.bytes > MAX_ASSET_BYTES:
                    raise BundleError(f"{entry.path} has {entry.bytes} bytes; expected {MAX_ASSET_BYTES} at most")
            elif entry.path.endswith(".safetensors"):
                headers[entry.path] = read_header(stream, entry.bytes, entry.path)
            else:
                index[entry.path] = load_json(stream.read(MAX_JSON_BYTES + 1), entry.path)
    tensors = {component: _assemble(base, headers, index) for component, base in COMPONENTS.items()}
    if unused := [*headers, *index]:
        raise BundleError(
            f"{MANIFEST} lists {short(unused[0])}, which belongs to no component; export the bundle again"
        )
    if verify_hashes:
        _verify_hashes(root, manifest.files, progress)
    return Bundle(
        root, manifest, {name: members for name, members in tensors.items() if members}, verify_hashes
    )


@contextmanager
def _blame(root: Path, file: str = "") -> Iterator[None]:
    """Puts the bundle's name in front of an error; `file` is what is being mapped, if anything."""
    try:
        yield
    except BundleError as error:
        raise BundleError(f"bundle '{root}': {error}") from error
    except SafetensorError as error:
        raise BundleError(f"bundle '{root}': {file} cannot be mapped: {error}; {DAMAGED}") from error
    except OSError as error:
        raise BundleError(
            f"bundle '{root}': {file} cannot be read: {error}; check its permissions"
        ) from error


@contextmanager
def _open_entry(root: Path, entry: FileEntry) -> Iterator[BinaryIO]:
    """A listed file, open, after a look at its size."""
    with _open_inside(root, entry.path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != entry.bytes:
            raise BundleError(f"{entry.path} is {size} bytes long, {MANIFEST} says {entry.bytes}; {DAMAGED}")
        yield stream


@contextmanager
def _open_inside(root: Path, file: str) -> Iterator[BinaryIO]:
    """A regular file that lies inside the bundle, symbolic links followed; OSErrors become BundleErrors."""
    try:
        real = Path(os.path.realpath(root / file))
        if not real.is_relative_to(os.path.realpath(root)):
            raise BundleError(
                f"{file} is a link that leaves the bundle and was not opened; "
                "put the file itself there if you trust where it came from"
            )
        if not stat.S_ISREG(os.stat(real).st_mode):  # a pipe would block, a device would not end
            raise BundleError(f"{file} is not an ordinary file; {DAMAGED}")
        with open(real, "rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise BundleError(f"{file} is missing; copy or export the bundle again") from error
    except OSError as error:
        raise BundleError(
            f"{file} cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _assemble(
    base: str, headers: dict[str, dict[str, TensorEntry]], index: dict[str, Any]
) -> dict[str, TensorEntry]:
    """Takes the files of one component out of `headers` and `index` and joins them."""
    name = f"{base}.safetensors.index.json"
    if name not in index:
        return headers.pop(f"{base}.safetensors", {})
    value = index.pop(name)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BundleError(f"{name} has no weight_map of tensor names to files; {DAMAGED}")
    joined: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = base[: base.rfind("/") + 1] + shard
        if file not in headers:
            raise BundleError(
                f"{name} names the file {short(file)}, which {MANIFEST} does not list; {DAMAGED}"
            )
        for tensor, entry in headers.pop(file).items():
            if weight_map.get(tensor) != shard:
                raise BundleError(f"{file}: tensor {short(tensor)} is not where {name} says; {DAMAGED}")
            joined[tensor] = entry
    if absent := [tensor for tensor in weight_map if tensor not in joined]:
        raise BundleError(f"{name}: tensor {short(absent[0])} is in none of the files; {DAMAGED}")
    return joined


def _verify_hashes(root: Path, files: Sequence[FileEntry], progress: Progress | None) -> None:
    total, done = sum(entry.bytes for entry in files), 0
    for entry in files:
        digest = hashlib.sha256()
        with _open_entry(root, entry) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        if digest.hexdigest() != entry.sha256:
            raise BundleError(f"{entry.path} does not match its SHA-256 in {MANIFEST}; {DAMAGED}")


def _place(
    tensor: Tensor, entry: TensorEntry, name: str, device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise BundleError(
            f"{entry.file}: tensor {short(name)} changed since the bundle was opened; open it again"
        )
    placed = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
    if not is_finite(placed):
        if is_finite(tensor):
            raise BundleError(
                f"{entry.file}: tensor {short(name)} does not fit into {dtype}; choose a wider type"
            )
        raise BundleError(
            f"{entry.file}: tensor {short(name)} holds NaN or Inf; export it again from a sound checkpoint"
        )
    return placed
