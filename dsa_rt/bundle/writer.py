"""Writing a bundle: everything into a hidden sibling folder, checked by the reader, then renamed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dsa_rt.bundle.manifest import MANIFEST, FileEntry, Manifest
from dsa_rt.bundle.reader import ASSETS, COMPONENTS, Bundle, read_bundle
from dsa_rt.bundle.strict import short
from dsa_rt.bundle.tensors import check_writable, write_tensors
from dsa_rt.errors import BundleError, OptionError, OutputError
from dsa_rt.output import whole_file


def write_bundle(
    path: str | os.PathLike[str],
    manifest: Manifest,
    tensors: Mapping[str, Mapping[str, Tensor]],
    overwrite: bool = False,
    shard_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] | None = None,
    assets: Mapping[str, bytes] | None = None,
) -> Bundle:
    """Writes the folder `path` and opens it. Nothing gets that name unless all of it is written and sound.

    manifest: its `files` are replaced by what is written.
    tensors: by component (see COMPONENTS) and name; any device and stride, written in the dtype they have.
    assets: whole files by name (see ASSETS).
    overwrite: replace an existing bundle (and nothing but a bundle).
    shard_bytes: a component with more tensor bytes is split into files of at most this size (or one tensor).
    progress: called with (bytes written, bytes in all).
    Raises BundleError for contents that no reader would accept, OutputError when the folder cannot be
    written; what was there before is then intact.
    """
    if shard_bytes < 1:
        raise OptionError(f"shard_bytes is {shard_bytes}; expected a size of at least 1 byte")
    for component, members in tensors.items():
        if component not in COMPONENTS:
            raise BundleError(f"unknown component {short(component)}; a bundle has {', '.join(COMPONENTS)}")
        for name, tensor in members.items():
            check_writable(name, tensor, component)
    for name in assets or {}:
        if name not in ASSETS:
            raise BundleError(f"unknown asset {short(name)}; a bundle has {', '.join(ASSETS)}")
    target = Path(os.path.realpath(path))
    check_target(target, overwrite)
    total = sum(tensor.nbytes for members in tensors.values() for tensor in members.values())
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, total)

    try:
        # Leaving the block, in whichever way, removes the temporary folder with what is still in it.
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix=".dsa_rt-", ignore_cleanup_errors=True
        ) as folder:
            new, old = Path(folder, "new"), Path(folder, "old")
            new.mkdir()
            files: list[FileEntry] = []
            for component, members in tensors.items():
                if members:
                    files += _write_component(new, COMPONENTS[component], members, shard_bytes, advance)
            files += [write_file(new, ASSETS[name], data) for name, data in (assets or {}).items()]
            (new / MANIFEST).write_bytes(dataclasses.replace(manifest, files=tuple(files)).to_json())
            bundle = read_bundle(new, verify_hashes=False)
            swap(new, target, old)
    except OSError as error:
        raise OutputError(
            f"cannot write the bundle '{target}': {error.strerror or error}; "
            "check the free space and the permissions of its folder, or choose another place"
        ) from error
    return dataclasses.replace(bundle, path=target, hashes_verified=True)


def write_manifest(bundle: Bundle, manifest: Manifest) -> Bundle:
    """Replaces the manifest of a bundle on disk, in one step, and keeps its tensors: for a calibration, say.

    The manifest's `files` stay those of the bundle. Raises BundleError or OutputError, the old manifest being
    intact then.
    """
    manifest = Manifest.from_json(dataclasses.replace(manifest, files=bundle.manifest.files).to_json())
    changed = dataclasses.replace(bundle, manifest=manifest)
    with whole_file(bundle.path / MANIFEST) as temporary:
        temporary.write_bytes(manifest.to_json())
    return changed


def check_target(target: Path, overwrite: bool) -> None:
    """Raises OutputError unless a bundle may be written to `target`, a path without links."""
    if not target.parent.is_dir():
        raise OutputError(
            f"cannot write the bundle '{target}': there is no folder '{target.parent}'; create it first"
        )
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(
            f"'{target}' exists: choose another name, or replace that bundle with overwrite=True (--overwrite)"
        )
    if not (target / MANIFEST).is_file():
        raise OutputError(f"'{target}' is not a bundle and will not be overwritten: choose another name")
    strangers = (
        file
        for file in target.rglob("*")
        if not file.is_dir() and file.suffix not in (".json", ".safetensors")
    )
    if (stranger := next(strangers, None)) is not None:
        raise OutputError(
            f"'{target}' also holds '{stranger.relative_to(target)}', which would be lost: "
            "move it away, or choose another name"
        )


def plan_shards(base: str, sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file of a component, by their bytes: file -> names, in alphabetical order.

    base: the component's file without suffix. One file where all fit into it, else numbered ones that hold at
    most shard_bytes of tensors or one tensor.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(sizes):
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= sizes[name]
    if len(shards) == 1:
        return {f"{base}.safetensors": shards[0]}
    count = len(shards)
    return {f"{base}-{number:05d}-of-{count:05d}.safetensors": names for number, names in enumerate(shards, 1)}


def write_index(folder: Path, base: str, shards: Mapping[str, Sequence[str]], size: int) -> FileEntry:
    """The file that says where a component's tensors are, in the layout of transformers. size: bytes of all."""
    weight_map = {name: Path(file).name for file, names in shards.items() for name in names}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1).encode()
    return write_file(folder, f"{base}.safetensors.index.json", text)


def write_file(folder: Path, path: str, data: bytes) -> FileEntry:
    """Writes `path` inside `folder`, and says so."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)
    return FileEntry(path, hashlib.sha256(data).hexdigest(), len(data))


def _write_component(
    folder: Path, base: str, tensors: Mapping[str, Tensor], shard_bytes: int, advance: Callable[[int], None]
) -> list[FileEntry]:
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = plan_shards(base, sizes, shard_bytes)
    (folder / base).parent.mkdir(exist_ok=True)
    files = [
        FileEntry(file, *write_tensors(folder / file, {name: tensors[name] for name in names}, advance))
        for file, names in shards.items()
    ]
    if len(shards) > 1:
        files.append(write_index(folder, base, shards, sum(sizes.values())))
    return files


def swap(new: Path, target: Path, old: Path) -> None:
    """Renames `new` to `target`; what had that name before becomes `old`. On an error all is as it was."""
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
