"""What is in a bundle, for people and machines, from its manifest and headers alone."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dsa_rt.bundle.reader import Bundle

if TYPE_CHECKING:
    from dsa_rt.policy import Policy, StepPlan


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


def describe_plan(policy: Policy, plan: StepPlan, cache_bytes: Mapping[str, int]) -> dict[str, Any]:
    """JSON-ready: what a many-step run under a policy computes. cache_bytes: of K/V between steps, by dtype."""
    groups = () if plan.policy is None else plan.policy.groups
    return {
        "policy": policy.name,
        "steps": plan.steps,
        "passes": plan.passes,
        "tokens": plan.tokens,
        "groups": [
            {"share": share, "steps": budget, "tokens": size}
            for (share, budget), size in zip(groups, plan.sizes, strict=bool(groups))
        ],
        "selection": plan.policy.selection if plan.policy is not None and plan.stale else None,
        "scoring_steps": list(plan.scoring),
        "active_tokens": list(plan.counts),
        "token_step_share": plan.token_step_share,
        "cache_bytes": dict(cache_bytes),
    }


def describe_plan_text(plan: Mapping[str, Any]) -> str:
    """A :func:`describe_plan` as aligned lines for a terminal."""
    rows = [("policy", plan["policy"]), ("steps", f"{plan['steps']}, {plan['passes']} of them with a pass")]
    for number, group in enumerate(plan["groups"], 1):
        share = f"{group['share']:.4g} of {plan['tokens']} tokens: {group['tokens']}"
        rows.append((f"group {number}", f"budget {group['steps']} of {plan['steps']} steps, {share}"))
    if plan["scoring_steps"]:
        first, last = plan["scoring_steps"][0], plan["scoring_steps"][-1]
        rows.append(("selection", f"{plan['selection']}, by the change of velocity in steps {first} to {last}"))
    elif plan["selection"] is not None:
        rows.append(("selection", plan["selection"]))
    share = plan["token_step_share"]
    rows += [
        ("active tokens", _compressed(plan["active_tokens"])),
        ("expected time", f"{share:.1%} of {plan['steps']} full steps: {share * plan['steps']:.4g} of them"),
        ("K/V between steps", ", ".join(f"{_size(size)} in {name}" for name, size in plan["cache_bytes"].items())),
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def _compressed(counts: Sequence[int]) -> str:
    """Tokens per step with repeated stretches told once: "5 × 336, 7 × (3 × 54, 336), 4 × 336"."""
    parts, start = [], 0
    while start < len(counts):
        best, length = 1, 1
        for period in range(1, (len(counts) - start) // 2 + 1):
            pattern = counts[start : start + period]
            repeats = 1
            while counts[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > best * length:
                best, length = repeats, period
        runs = [(value, len(list(same))) for value, same in groupby(counts[start : start + length])]
        inside = ", ".join(f"{count} × {value}" if count > 1 else str(value) for value, count in runs)
        parts.append(inside if best == 1 else f"{best} × {inside}" if length == 1 else f"{best} × ({inside})")
        start += best * length
    return ", ".join(parts)


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
