"""Files that are written whole or not at all.

Everything goes to a hidden sibling first and is renamed when it is complete, so that an error, a full disk or
Ctrl-C never leaves half a file under the asked name, nor damages what was there before. No torch here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dsa_rt.errors import OutputError

# Suffix → the module that writes it.
VIDEO_FORMATS = {".mp4": "av", ".gif": "PIL", ".png": "PIL", ".npy": "numpy", ".npz": "numpy"}
CHART_FORMATS = {".png": "matplotlib", ".svg": "matplotlib", ".pdf": "matplotlib"}
RECORD_FORMATS = {".json": "json"}

_PATTERN = re.compile(r"%(0[1-9]\d?)?d")
_NUMBERED = re.compile(r"\d{4,}\.png")


def is_pattern(path: Path) -> bool:
    """Whether the name holds a frame number ("frame-%04d.png")."""
    return "%" in path.name


def is_folder(path: Path) -> bool:
    """Whether frames go into a folder of this name: it has no suffix, or it is a folder already."""
    return path.suffix == "" or path.is_dir()


def check_output(
    path: str | os.PathLike[str], formats: Mapping[str, str] = VIDEO_FORMATS, frames: int | None = None
) -> Path:
    """Makes sure that `path` can be written later; call it before anything slow. Leaves nothing behind.

    formats: what the name may end in, and the module that writes it. With VIDEO_FORMATS also a folder (a name
        without suffix) or a `%d` pattern, for numbered PNG files.
    frames: how many frames will come, if known: more than one do not fit into a single PNG.
    Raises OutputError naming the path and what to do.
    """
    target = Path(path)
    with _as_output_error(target):
        if formats is VIDEO_FORMATS and is_pattern(target):
            _check_pattern(target)
            module = "PIL"
        elif formats is VIDEO_FORMATS and is_folder(target):
            _check_frame_folder(target)
            module = "PIL"
        else:
            _check_file(target, formats, frames)
            module = formats[target.suffix.lower()]
        if importlib.util.find_spec(module) is None:
            package = "pillow" if module == "PIL" else module
            raise OutputError(f"writing '{target}' needs the package {package}: pip install {package}")
        if not target.parent.is_dir():
            raise OutputError(
                f"cannot write '{target}': there is no folder '{target.parent}'; create it first"
            )
        probe = _sibling(target)
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        finally:
            with suppress(FileNotFoundError):
                os.unlink(probe)
    return target


def _check_file(target: Path, formats: Mapping[str, str], frames: int | None) -> None:
    if target.suffix.lower() not in formats:
        more = ""
        if formats is VIDEO_FORMATS:
            more = ", or name a folder or a pattern such as 'frame-%04d.png' for PNG frames"
        raise OutputError(
            f"cannot tell the format of '{target}' from its name: let it end in {', '.join(formats)}{more}"
        )
    if target.exists() and not target.is_file():
        raise OutputError(f"'{target}' exists and is not an ordinary file: choose another name")
    if target.exists() and not _writable(target):
        raise OutputError(f"'{target}' is write-protected: choose another name or change its permissions")
    if formats is VIDEO_FORMATS and target.suffix.lower() == ".png" and frames is not None and frames > 1:
        stem = target.with_suffix("")
        raise OutputError(
            f"'{target}' is one picture and there are {frames} frames: "
            f"use the folder '{stem}' or the pattern '{stem}-%04d.png'"
        )


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a hidden sibling (same suffix) to write to; it takes the name `path` when the block ends well.

    When the block raises, the sibling is removed and `path` is as it was. OSErrors become OutputError.
    """
    target = Path(path)
    temporary = _sibling(target)
    try:
        with _as_output_error(target):
            yield temporary
            os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


@contextmanager
def whole_frames(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a hidden folder for `0000.png`, `0001.png`, …; when the block ends well they become `path`.

    path: a folder (new, empty, or holding only numbered PNG frames, which are replaced as a whole), or a
        pattern with one `%d` or `%04d` in its last part, whose files are renamed into place one after the
        other.
    """
    target = Path(path)
    temporary = _sibling(target)
    try:
        with _as_output_error(target):
            os.mkdir(temporary)
            yield temporary
            if is_pattern(target):
                for number, source in enumerate(sorted(temporary.iterdir(), key=lambda item: int(item.stem))):
                    os.replace(source, target.with_name(target.name % number))
            else:
                _swap_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_folder(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    _check_frame_folder(target)
    aside = _sibling(target)
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _writable(target: Path) -> bool:
    return os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _check_pattern(target: Path) -> None:
    pattern = _PATTERN.search(target.name)
    if pattern is None or target.name.count("%") != 1 or target.suffix.lower() != ".png":
        raise OutputError(
            f"'{target}' is not a pattern for PNG frames: "
            "it needs one %d or %04d and the suffix .png, for example 'frames/%04d.png'"
        )


def _check_frame_folder(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(
            f"'{target}' exists and is not a folder: choose another name, or add a suffix such as .mp4"
        )
    stranger = next((item.name for item in target.iterdir() if not _NUMBERED.fullmatch(item.name)), None)
    if stranger is not None:
        raise OutputError(
            f"the folder '{target}' holds '{stranger}', which is not a frame: choose a new or empty folder, "
            f"or the pattern '{target / '%04d.png'}'"
        )


def _sibling(target: Path) -> Path:
    """A hidden name next to the target, with its suffix, that nothing else uses."""
    return target.with_name(f".{target.stem.replace('%', '_')[:80]}.{secrets.token_hex(6)}{target.suffix}")


@contextmanager
def _as_output_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write '{target}': {error.strerror or error}; "
            "check the free space and the permissions of its folder, or choose another place"
        ) from error
