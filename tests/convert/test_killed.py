"""`dsa-rt export`, killed with SIGKILL at every step it takes in the file system, and within its shards.

At no time is there a bundle of that name that is not whole, and the same command ends with the same bytes as one that
was left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from published import original_state, transformer
from safetensors.torch import save_file

from dsa_rt.bundle import open_bundle
from dsa_rt.cli import main
from dsa_rt.convert import convert
from dsa_rt.errors import BundleError

# Arguments: folder, the first step, a bundle to overwrite or "", and the command without its destination. Folder N/
# gets what an export leaves that is killed at its step N; the last one was not. One interpreter, in one thread, which
# has imported all that an export needs when it forks.
DRIVER = """
import os, shutil, signal, sys
import torch
from dsa_rt.cli import main
from dsa_rt.convert import sources

STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "tempfile.mkdtemp")
root, first, old, *command = sys.argv[1:]
read = sources.SafetensorsSource.read

def export(folder, left):
    def step():
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def reading(source, name):
        if "ffn" in name:
            step()
        return read(source, name)

    sources.SafetensorsSource.read = reading
    sys.addaudithook(lambda event, args: event in STEPS and str(args[0]).startswith(folder) and step())
    return main([*command[:2], f"{folder}/b", *command[2:]])

torch.set_num_threads(1)
assert main([*command[:2], f"{root}-first", *command[2:]]) == 0
number = int(first)
while True:
    folder = f"{root}/{number}"
    shutil.copytree(old, f"{folder}/b") if old else os.makedirs(folder)
    process = os.fork()
    if process == 0:
        os._exit(export(folder, number))
    status = os.waitpid(process, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    assert os.WTERMSIG(status) == signal.SIGKILL
    number += 1
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("overwrite", "first"), [(False, 0), (True, 35)])
def test_killed_at_every_step(tmp_path: Path, overwrite: bool, first: int) -> None:
    """Overwriting is another matter only in the last steps."""
    source, old, root = tmp_path / "wan.safetensors", tmp_path / "old", tmp_path / "runs"
    save_file(original_state(transformer(1, 1, 128, layers=1)), source)
    convert(source, old, dtype="fp16")
    convert(source, tmp_path / "reference", shard_bytes=300_000)
    reference = contents(tmp_path / "reference")
    assert len([name for name in reference if name.startswith("generator-")]) == 4
    options = ["--shard-size", "300kB", "--quiet", *(["--overwrite"] if overwrite else [])]
    command = ["export", str(source), *options]
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, root, str(first), str(old) if overwrite else "", *command],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    *killed, last = sorted(root.iterdir(), key=lambda folder: int(folder.name))
    named = in_shards = 0
    for folder in killed:
        in_shards += any(file.stat().st_size > 100_000 for file in folder.rglob("*.safetensors.unfinished"))
        if (folder / "b").exists():
            open_bundle(folder / "b")  # whole: all hashes
            named += not overwrite or contents(folder / "b") != contents(old)
        else:
            with pytest.raises(BundleError, match="there is no bundle"):
                open_bundle(folder / "b")
        assert main(["export", str(source), str(folder / "b"), *options]) == 0
    for folder in (*killed, last):
        assert contents(folder / "b") == reference, folder
        assert [name for name in os.listdir(folder) if not name.startswith(".dsa_rt-")] == ["b"]
        assert overwrite or len(os.listdir(folder)) == 1  # what was to be overwritten is kept beside it
    assert named >= 2 and (overwrite or (len(killed) > 40 and in_shards > 3))
