"""What is in a bundle, for people and machines, from its manifest and headers alone."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

from dsa_rt.bundle.reader import Bundle


def describe(bundle: Bundle) -> dict[str, Any]:
    """JSON-ready summary of manifest and headers; of the calibration only how many values there are."""
    manifest = bundle.manifest
    components = {}
    for component, entries in bundle.tensors.items():
        parameters: Counter[str] = Counter()
        for entry in entries.values():
            parameters[str(entry.dtype).removeprefix("torch.")] += entry.numel
        components[component] = {
            "tensors": len(entries),
            "parameters": sum(parameters.values()),
            "dtypes": dict(parameters),
            "bytes": sum(entry.nbytes for entry in entries.values()),
        }
    summary = {"path": str(bundle.path), "hashes": "ok" if bundle.hashes_verified else "not checked"}
    summary |= dataclasses.asdict(manifest)
    levels = (manifest.calibration or {}).get("levels", {})
    return summary | {
        "calibration": {
            f"pass {number}": f"{len(level['confidence'])} values" for number, level in levels.items()
        }
        or None,
        "components": components,
        "files": {entry.path: entry.bytes for entry in manifest.files},
    }


def describe_text(bundle: Bundle) -> str:
    """The same as aligned lines for a terminal."""
    summary = describe(bundle)
    rows = [(key, value) for key, value in summary.items() if key not in ("components", "files")]
    for component, part in summary["components"].items():
        dtypes = ", ".join(part["dtypes"])
        counts = f"{part['parameters']:,} parameters in {part['tensors']} tensors"
        rows.append((f"{component} tensors", f"{counts}, {dtypes}, {_size(part['bytes'])}"))
    rows += [(file, _size(count)) for file, count in summary["files"].items()]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {_words(value)}" for key, value in rows)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_words(key)} {_words(member)}" for key, member in value.items())
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isprintable() else ascii(text)  # no escape sequences from a bundle's author


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
