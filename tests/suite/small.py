"""Small cases of the suite: random weights, and two that cannot run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dsa_rt.suite.cases import Case


def small(name: str, form: str = "causal", policy: str = "dense", **changes: Any) -> Case:
    """Random weights of width 96, 16x32 pixels, three chunks of three latent frames."""
    case = Case(name, "to try the suite", size="tiny", form=form, height=16, width=32, frames=33, policy=policy,
                decoder="tiny", dtype="fp32")  # fmt: skip
    return replace(case, **changes)


SMALL = (
    small("dense"), small("refined", policy="scripted:0,2"), small("many", "bidirectional", "hsa-25", steps=20),
    small("batch", policy="fixed-1", batch=2), small("too-large", device="cuda"), small("wrong", policy="scripted:9"),
)  # fmt: skip
