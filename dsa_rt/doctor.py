"""What was found on this machine, which backend runs which op, and why: the facts behind `dsa-rt doctor`.

Nothing here fails: what cannot be found is reported with its reason.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from typing import Any

from dsa_rt.errors import OptionError
from dsa_rt.machine import machine, versions

OPTIONAL = {
    "av": "MP4 output",
    "pillow": "GIF and PNG output",
    "matplotlib": "charts",
    "tqdm": "progress bars",
    "triton": "Triton kernels on GPUs",
    "cupy": "frames as CuPy arrays",
    "nvtx": "ranges in GPU profiles",
    "diffusers": "comparison with the reference models in tests",
    "transformers": "converting published text encoders",
}
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def examine() -> dict[str, Any]:
    """All findings, JSON-ready: versions, machine, torch, cuda, native, packages, backends, choices,
    bundles."""
    import torch

    return {
        "versions": versions(),
        "machine": {**machine(), "memory_bytes": _memory(), "cpu_features": _cpu_features()},
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "built_with_cuda": torch.version.cuda,
        },
        "cuda": _cuda(),
        "native": _native(),
        "packages": {name: {"version": _version(name), "for": purpose} for name, purpose in OPTIONAL.items()},
        "backends": _backends(),
        "choices": _choices(),
        "bundles": {name: _bundle(name) for name in ("demo", "demo-many-step")},
    }


def report(found: dict[str, Any]) -> str:
    """The findings as text for a terminal."""
    lines: list[str] = []

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        width = max((len(name) for name, _ in rows), default=0)
        lines.extend([title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""])

    host, torch = found["machine"], found["torch"]
    memory = "not known" if host["memory_bytes"] is None else f"{host['memory_bytes'] / 1e9:.1f} GB"
    section(
        "machine",
        [
            ("processor", f"{host['cpu']}, {host['cores']} usable cores, {memory} memory"),
            ("features", " ".join(host["cpu_features"]) or "not known"),
            ("system", host["platform"]),
        ],
    )
    rows = [(name, version) for name, version in found["versions"].items() if name != "torch"]
    built = torch["built_with_cuda"] or "without"
    rows.append(
        (
            "torch",
            f"{torch['version']} (CUDA: {built}; {torch['threads']} threads, {torch['cpu_capability']})",
        )
    )
    section("software", rows)
    native = found["native"]
    rows = [("found", "yes" if native["available"] else f"no: {native['why']}")]
    rows += [
        (name.replace("_", " "), _words(value))
        for name, value in native.items()
        if name not in ("available", "why")
    ]
    section("native module", rows)
    cuda = found["cuda"]
    rows = [("found", "yes" if cuda["available"] else f"no: {cuda['why']}")]
    rows += [
        (
            f"cuda:{index}",
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.1f} GB",
        )
        for index, gpu in enumerate(cuda["devices"])
    ]
    section("CUDA", rows)
    section(
        "optional packages",
        [
            (name, f"{part['version'] or 'not installed'} ({part['for']})")
            for name, part in found["packages"].items()
        ],
    )
    served: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for place, ops in found["backends"].items():  # places that are served alike share a section
        served.setdefault(repr(ops), ([], ops))[0].append(place)
    for places, ops in served.values():
        rows = [(name, f"{op['backend']}: {op['why']}") for name, op in ops.items()]
        section(f"backends on {' and '.join(places)}", rows)
    measured = found["choices"]
    state = measured["why"] or "empty: nothing was measured on a GPU yet, the order of backends is that of the code"
    if measured["rows"]:
        state = f"{measured['rows']} rows for compute capability {', '.join(measured['devices'])}"
    section("measurements", [("choices.json", state)])
    section(
        "bundles",
        [(name, "found, checked" if part["ok"] else part["why"]) for name, part in found["bundles"].items()],
    )
    return "\n".join(lines).rstrip()


def _version(name: str) -> str | None:
    """Installed version of a package; CuPy goes by one name per CUDA version."""
    names = [name] if name != "cupy" else ["cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x"]
    for candidate in names:
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def _native() -> dict[str, Any]:
    try:
        module = importlib.import_module("dsa_rt._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "dsa_rt._native"
        why = "not built; build it with pip install ." if missing else f"it does not load: {error}"
        return {"available": False, "why": why}
    return {"available": True, "why": None, **module.build_info()}


def _cuda() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        devices = []
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            devices.append(
                {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
            )
        return {"available": True, "why": None, "devices": devices}
    why = "this torch is built without CUDA"
    if torch.version.cuda is not None:
        try:
            torch.zeros(1, device="cuda")
            why = "torch sees no device"
        except (RuntimeError, AssertionError) as error:
            why = " ".join(str(error).split())
    return {"available": False, "why": why, "devices": []}


def _backends() -> dict[str, dict[str, dict[str, str]]]:
    """For each device and dtype: op → the backend that serves it and the reason."""
    import torch

    try:
        from dsa_rt.ops import backend
    except (ImportError, OptionError):  # the native module and the table say why, in their own sections
        return {}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {
        f"{device} {str(dtype).removeprefix('torch.')}": {
            choice.op: {"backend": choice.backend, "why": choice.reason}
            for choice in backend.describe(device, dtype)
        }
        for device in devices
        for dtype in dtypes
    }


def _choices() -> dict[str, Any]:
    """The table of measured choices: how many rows, for which devices."""
    try:
        from dsa_rt.ops import backend
    except ImportError:
        return {"ok": False, "why": "not read: the native module does not load", "rows": 0, "devices": []}
    except OptionError as error:
        return {"ok": False, "why": str(error), "rows": 0, "devices": []}
    rows = [row for places in backend.MEASURED.values() for several in places.values() for row in several]
    return {"ok": True, "why": None, "rows": len(rows), "devices": sorted({row.device for row in rows})}


def _bundle(name: str) -> dict[str, Any]:
    from dsa_rt.errors import DsaRtError

    try:
        from dsa_rt.bundle import open_bundle
        from dsa_rt.runtime import find_bundle

        path = find_bundle(name)
        open_bundle(path)
    except (DsaRtError, ImportError) as error:
        return {"ok": False, "why": " ".join(str(error).split())}
    return {"ok": True, "why": None, "path": str(path)}


def _cpu_features() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            words = next(line for line in lines if line.lower().startswith(("flags", "features"))).split()
    except (OSError, StopIteration):
        return []
    return [flag for flag in FLAGS if flag in words]


def _memory() -> int | None:
    """Bytes of memory this process may use: that of the machine, or less where a cgroup says so."""
    found = None
    if sys.platform != "win32":
        import os

        try:
            found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            found = None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        if limit.isdigit():
            found = int(limit) if found is None else min(found, int(limit))
    except OSError:
        pass
    return found


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value) or "none"
