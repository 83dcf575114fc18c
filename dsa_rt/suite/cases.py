"""What is measured, as data."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsa_rt.errors import OptionError

PROMPT = "a red square bouncing, a blue circle at rest"
QUICK_FRAMES = 33


@dataclass(frozen=True)
class Case:
    """One row of the suite. Equal cases make equal clips.

    bundle: a bundle's folder or name; None for random weights of ``size`` and ``form``, see
    :mod:`dsa_rt.suite.random_weights`. height, width [pixels], frames, steps: None for the bundle's own. decoder:
    "bundle", or "tiny" for a tiny decoder of random weights, which is what random generators have. batch: prompts per
    call. device: "any" runs where the suite is told to, "cuda" there alone. Every run makes the clip of ``prompt`` and
    ``seed``, so that samples differ by time alone. about: for people.
    """

    name: str
    about: str
    bundle: str | None = None
    size: str | None = None
    form: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    policy: str = "dense"
    steps: int | None = None
    decoder: str = "bundle"
    batch: int = 1
    device: str = "any"
    dtype: str = "auto"
    prompt: str = PROMPT
    seed: int = 0

    def __post_init__(self) -> None:
        random = (self.size, self.form).count(None) == 0
        if random == (self.bundle is not None) or (not random and (self.size or self.form)):
            raise OptionError(f"case {self.name!r} needs either a bundle, or a size and a form for random weights")
        if self.decoder not in ("bundle", "tiny") or (self.decoder == "tiny") != random:
            raise OptionError(f"case {self.name!r}: decoder is {self.decoder!r}; random weights have 'tiny', bundles "
                              "'bundle'")  # fmt: skip
        if self.device not in ("any", "cuda") or self.batch < 1:
            raise OptionError(f"case {self.name!r}: expected device 'any' or 'cuda' and a batch of 1 or more; "
                              f"have {self.device!r} and {self.batch}")  # fmt: skip

    @property
    def random_weights(self) -> bool:
        return self.bundle is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def _demo(policy: str, about: str) -> Case:
    return Case(f"demo-{policy}", about, bundle="demo", policy=policy)


def _many(policy: str, about: str) -> Case:
    return Case(f"many-{policy}", about, bundle="demo-many-step", policy=policy)


def _large(name: str, form: str, policy: str, about: str, steps: int | None = None) -> Case:
    return Case(
        f"1.3b-{name}", about, size="wan2.1-t2v-1.3b", form=form, height=480, width=832, frames=81, policy=policy,
        steps=steps, decoder="tiny", device="cuda", dtype="bf16",
    )  # fmt: skip


CASES = (
    _demo("dense", "few-step demo, all passes"),
    _demo("dsa", "few-step demo, its default policy"),
    _demo("dsa-paper", "few-step demo, the paper's rule"),
    _demo("fixed-2", "few-step demo, two passes for every chunk"),
    _many("dense", "many-step demo, 40 steps, guidance"),
    _many("hsa-50", "many-step demo, HSA at half of the token-steps"),
    _many("hsa-25", "many-step demo, HSA on 20 steps at half of their token-steps"),
    _many("window-75", "many-step demo, every second step of the middle skipped"),
    _large("causal-dense", "causal", "dense", "1.3B causal, 832x480, 81 frames, 4 passes"),
    _large("causal-dsa", "causal", "scripted:0,2,5", "the same, 3 of 7 chunks refined: 16 passes beside the context"),
    _large("dense", "bidirectional", "dense", "1.3B bidirectional, 832x480, 81 frames, 40 steps", 40),
    _large("hsa-50", "bidirectional", "hsa-50", "the same under HSA"),
    _large("hsa-25", "bidirectional", "hsa-25", "the same under HSA"),
)


def select(patterns: Iterable[str], cases: Sequence[Case] = CASES) -> list[Case]:
    """The cases whose names match one of the shell patterns, in their order; none given: all. :class:`OptionError` for
    a pattern that matches nothing."""
    wanted = list(patterns) or ["*"]
    for pattern in wanted:
        if not fnmatch.filter([case.name for case in cases], pattern):
            raise OptionError(
                f"no case is called {pattern!r}; there are {', '.join(case.name for case in cases)} "
                "(patterns such as 'demo-*' select several)"
            )
    return [case for case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in wanted)]


def quick(case: Case) -> Case:
    """A short clip of the same; its name says so, since it is not comparable with the whole one."""
    return replace(case, name=f"{case.name}, quick", frames=min(case.frames or QUICK_FRAMES, QUICK_FRAMES), policy=(
        "scripted:0" if case.policy.startswith("scripted:") else case.policy
    ))  # fmt: skip
