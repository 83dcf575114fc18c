"""Writing a bundle tensor by tensor, so that an interrupted export goes on where it stopped.

Everything goes to ``DEST.partial``: finished shards, and a journal of their hashes. The same command finds them there,
compares the hashes and leaves out what is done. ``DEST`` gets its name when all of it is written and checked. At any
time one tensor is in memory.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dsa_rt.bundle import ASSETS, COMPONENTS, MANIFEST, Bundle, FileEntry, Manifest
from dsa_rt.bundle.reader import read_bundle
from dsa_rt.bundle.strict import parse
from dsa_rt.bundle.tensors import stream_tensors
from dsa_rt.bundle.writer import check_target, plan_shards, swap, write_file, write_index
from dsa_rt.convert.parts import Part, read_json
from dsa_rt.errors import BundleError, OutputError

JOURNAL, LOCK = "journal.json", "lock.json"
_NEXT = f"{JOURNAL}.unfinished"
_BLOCK = 4 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Journal:
    """What an unfinished export has done. plan: fingerprint of the tensors and where they come from."""

    plan: str
    done: list[FileEntry]


def write_parts(
    dest: str | os.PathLike[str],
    manifest: Manifest,
    parts: Mapping[str, Part],
    assets: Mapping[str, Path],
    shard_bytes: int,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Writes the folder ``dest`` from tensors that are read one by one, and opens it.

    parts: by component. assets: name -> the file to copy. shard_bytes: files of a component are split at this size.
    progress: called with (bytes done, bytes in all). Raises OutputError (nothing written, or an export that can go on)
    and BundleError for contents that no reader would accept (nothing is left then).
    """
    target = Path(os.path.realpath(dest))
    begun = target.with_name(f"{target.name}.partial")
    shards = {component: _shards(component, part, shard_bytes) for component, part in parts.items()}
    files = {file: (component, names) for component, found in shards.items() for file, names in found.items()}
    plan = _fingerprint(parts, files)
    with suppress(BundleError):  # no journal there
        if not begun.exists() and _journal(target).plan == plan:
            os.rename(target, begun)  # it was killed when it had its name already: it ends once more
    check_target(target, overwrite)
    journal = _begun(begun, plan, overwrite)
    sizes = {file: sum(parts[c][n].entry.nbytes for n in names) for file, (c, names) in files.items()}
    _check_space(target, sizes, journal, assets)
    try:
        with _locked(begun):
            done = _write_shards(begun, parts, files, journal, plan, _counter(sum(sizes.values()), progress))
            for component, found in shards.items():
                if len(found) > 1:
                    total = sum(move.entry.nbytes for move in parts[component].values())
                    done.append(write_index(begun, COMPONENTS[component], found, total))
            done += [write_file(begun, ASSETS[name], file.read_bytes()) for name, file in assets.items()]
            (begun / MANIFEST).write_bytes(dataclasses.replace(manifest, files=tuple(done)).to_json())
            bundle = read_bundle(begun, verify_hashes=False)
            if target.exists():
                with tempfile.TemporaryDirectory(
                    dir=target.parent, prefix=".dsa_rt-", ignore_cleanup_errors=True
                ) as old:
                    swap(begun, target, Path(old, "old"))
            else:
                os.rename(begun, target)
        for name in (LOCK, JOURNAL):  # the journal last: with it the export is not at its end
            (target / name).unlink(missing_ok=True)
    except BundleError:
        shutil.rmtree(begun, ignore_errors=True)
        raise
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write the bundle '{target}': {error.strerror or error}; check the free space and the permissions "
            f"of its folder. What is done is in '{begun}': the same command goes on from there"
        ) from error
    return dataclasses.replace(bundle, path=target, hashes_verified=True)


def _shards(component: str, part: Part, shard_bytes: int) -> dict[str, list[str]]:
    return plan_shards(COMPONENTS[component], {name: move.entry.nbytes for name, move in part.items()}, shard_bytes)


def _fingerprint(parts: Mapping[str, Part], files: Mapping[str, tuple[str, list[str]]]) -> str:
    """Changes with any tensor's name, origin, dtype, shape or file, and with any file that one comes from."""
    sources = {file for part in parts.values() for move in part.values() for file in move.source.files}
    stats = {str(file.resolve()): (os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in sources}
    moves: dict[str, list[Any]] = {}
    for file, (component, names) in files.items():
        found = [(name, parts[component][name]) for name in names]
        moves[file] = [(name, move.key, str(move.entry.dtype), move.entry.shape) for name, move in found]
    return hashlib.sha256(json.dumps([stats, moves], sort_keys=True).encode()).hexdigest()


def _begun(begun: Path, plan: str, overwrite: bool) -> Journal:
    """The journal of an export of the same tensors that was interrupted, or a new one."""
    if not begun.exists() or (begun.is_dir() and {file.name for file in begun.iterdir()} <= {LOCK, _NEXT}):
        return Journal(plan, [])
    if not begun.is_dir() or not (begun / JOURNAL).is_file():
        raise OutputError(f"'{begun}' exists and is no unfinished export; move it away, or choose another name")
    try:
        journal = _journal(begun)
        fault = None if journal.plan == plan else "is the unfinished export of another checkpoint, or of other options"
    except BundleError as error:
        fault = f"has a damaged journal ({error})"
    if fault is None:
        return journal
    if not overwrite:
        raise OutputError(f"'{begun}' {fault}; remove it, or begin anew with overwrite=True (--overwrite)")
    with _locked(begun):
        shutil.rmtree(begun)
    return Journal(plan, [])


def _check_space(target: Path, sizes: Mapping[str, int], journal: Journal, assets: Mapping[str, Path]) -> None:
    done = {entry.path for entry in journal.done}
    need = sum(size for file, size in sizes.items() if file not in done)
    need += sum(file.stat().st_size for file in assets.values())
    free = shutil.disk_usage(target.parent).free
    if need + _BLOCK > free:
        raise OutputError(
            f"the bundle '{target}' needs {need / 1e9:.2f} GB more, but {free / 1e9:.2f} GB are free there; make room, "
            "choose another place, or a smaller --dtype"
        )


@contextmanager
def _locked(begun: Path) -> Iterator[None]:
    """Keeps two exports from writing the same folder; the lock ends with the process, however it ends."""
    begun.mkdir(exist_ok=True)
    with open(begun / LOCK, "wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another export is writing '{begun}'; wait until it ends") from error
        yield


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, total)

    return advance


def _read(part: Part, name: str) -> Tensor:
    return part[name].read()


def _write_shards(
    folder: Path, parts: Mapping[str, Part], files: Mapping[str, tuple[str, list[str]]], journal: Journal, plan: str,
    advance: Callable[[int], None],
) -> list[FileEntry]:  # fmt: skip
    """Writes every shard that is not there yet, or not whole."""
    before = {entry.path: entry for entry in journal.done}
    done: list[FileEntry] = []
    _save(folder, Journal(plan, list(journal.done)))
    for file, (component, names) in files.items():
        entries = {name: parts[component][name].entry for name in names}
        entry = before.get(file)
        if entry is not None and _is_whole(folder, entry):
            advance(sum(tensor.nbytes for tensor in entries.values()))
        else:
            unfinished = folder / f"{file}.unfinished"
            unfinished.unlink(missing_ok=True)
            unfinished.parent.mkdir(exist_ok=True)
            read = partial(_read, parts[component])
            entry = FileEntry(file, *stream_tensors(unfinished, entries, read, advance))
            os.replace(unfinished, folder / file)
        done.append(entry)
        kept = [other for other in journal.done if other.path not in {known.path for known in done}]
        _save(folder, Journal(plan, [*done, *kept]))
    return done


def _journal(folder: Path) -> Journal:
    return parse(Journal, read_json(folder / JOURNAL), JOURNAL)


def _save(folder: Path, journal: Journal) -> None:
    """Under a name of its own first: one that a killed process leaves is known, and the next save replaces it."""
    (folder / _NEXT).write_text(json.dumps(dataclasses.asdict(journal), indent=1), encoding="utf-8")
    os.replace(folder / _NEXT, folder / JOURNAL)


def _is_whole(folder: Path, entry: FileEntry) -> bool:
    file = folder / entry.path
    if not file.is_file() or file.stat().st_size != entry.bytes:
        return False
    digest: Any = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return bool(digest.hexdigest() == entry.sha256)
