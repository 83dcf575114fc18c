"""Names of policies: what the command line, ``compile(policy=...)`` and statistics call them."""

from __future__ import annotations

import dataclasses
import difflib
import re

from dsa_rt.errors import PolicyError
from dsa_rt.policy.base import Policy
from dsa_rt.policy.dsa import DSA, TARGETS
from dsa_rt.policy.fixed import Fixed
from dsa_rt.policy.hsa import HSA, OURS, PRESETS

_DSA = {
    "dsa": DSA(),
    "dsa-paper": DSA("paper"),
    "dsa-paper-retest": DSA("paper", retest=True),
    "dsa-calibrated": DSA("calibrated"),
    "dsa-calibrated-retest": DSA("calibrated", retest=True),
}
_HSA = {**PRESETS, **OURS, "hsa": HSA()}
NAMES = ("dense", "fixed-N", "fixed-N-then-M", *_DSA, *_HSA)
HSA_OPTIONS = ("groups=", "window=", "selection=", "update=", "strength=", "steps=")
OPTIONS = ("passes=", "calls=", "fps=", "retest", "retest=no", "first=free")
_FIXED = re.compile(r"fixed-([0-9]{1,6})(?:-then-([0-9]{1,6}|all))?")
_FLAG = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def parse_policy(policy: str | Policy) -> Policy:
    """A policy object as it is, or the one a name stands for, in any case.

    Names: dense, fixed-2, fixed-4-then-1 (first chunk, then the others), dsa (calibrated where the bundle
    can, else paper), dsa-paper, dsa-paper-retest, dsa-calibrated (the same as dsa-calibrated-retest). Those
    of DSA take options after a colon, separated by commas: one target (passes=2.5 per chunk, calls=24 per
    clip, fps=16), retest or retest=no, first=free; see :class:`DSA`. For many-step bundles: hsa-75a, hsa-75b,
    hsa-50 (the same as hsa), hsa-25, window-75 and window-55; options are groups=0.16@40+0.84@10 (share of
    the tokens @ steps), window=0.8, selection=random, update=extrapolated, strength=0.5, steps=40; see :class:`HSA`.
    :class:`PolicyError` for anything else, with the nearest name.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise PolicyError(f"policy is {policy!r}; expected a name ({', '.join(NAMES)}) or a policy object")
    base, colon, rest = policy.strip().lower().partition(":")
    base = base.strip()
    found: Policy | None = _DSA.get(base) or _HSA.get(base)
    if base == "dense":
        found = Fixed()
    elif match := _FIXED.fullmatch(base):
        first, later = match.groups()
        later_passes = int(first) if later is None else None if later == "all" else int(later)
        found = Fixed(later_passes, None if later is None else int(first))
    if found is None:
        raise PolicyError(f"unknown policy {policy!r}{_nearest(base, NAMES)}; there are {', '.join(NAMES)}")
    if not colon:
        return found
    if isinstance(found, HSA):
        return _hsa_with_options(found, base, rest, policy)
    if not isinstance(found, DSA):
        raise PolicyError(f"policy {policy!r}: {base} takes no options")
    return _with_options(found, base, rest, policy)


def _with_options(found: DSA, base: str, rest: str, policy: str) -> DSA:
    settings: dict[str, object] = {}
    targets = {key: field for field, key in TARGETS.items()}
    for part in rest.split(","):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if key in targets and equals:
            field, value = targets[key], _number(key, text, policy)
        elif key == "retest" and (flag := text if equals else "yes") in _FLAG:
            field, value = "retest", _FLAG[flag]
        elif key == "first" and text in ("free", "all"):
            field, value = "refine_first", text == "all"
        else:
            nearest = _nearest(part.strip(), OPTIONS)
            raise PolicyError(
                f"policy {policy!r}: option {part.strip()!r} is not known{nearest}; "
                f"{base} takes {', '.join(OPTIONS)}"
            )
        if field in settings:
            raise PolicyError(f"policy {policy!r}: {key} is stated twice")
        settings[field] = value
    if base.endswith("-retest") and "retest" in settings:
        raise PolicyError(f"policy {policy!r}: retest is stated twice")
    fields = {"rule": found.rule, "retest": found.retest} | settings
    return DSA(**fields)  # type: ignore[arg-type]


def _hsa_with_options(found: HSA, base: str, rest: str, policy: str) -> HSA:
    settings: dict[str, object] = {}
    for part in rest.split(","):
        key, _, text = (piece.strip() for piece in part.partition("="))
        if f"{key}=" not in HSA_OPTIONS or not text:
            raise PolicyError(
                f"policy {policy!r}: option {part.strip()!r} is not known{_nearest(part.strip(), HSA_OPTIONS)}; "
                f"{base} takes {', '.join(HSA_OPTIONS)}"
            )
        if key in settings:
            raise PolicyError(f"policy {policy!r}: {key} is stated twice")
        settings[key] = _hsa_value(key, text, policy)
    if "groups" in settings:
        settings = {"steps": None} | settings  # those of the name belong to its groups
    return dataclasses.replace(found, **settings)  # type: ignore[arg-type]


def _hsa_value(key: str, text: str, policy: str) -> object:
    if key in ("selection", "update"):
        return text
    if key == "steps":
        return _whole(key, text, policy)
    if key != "groups":
        return _number(key, text, policy)
    groups = []
    for group in text.split("+"):
        share, at, budget = group.partition("@")
        if not at:
            raise PolicyError(
                f"policy {policy!r}: {group.strip()!r} is not a group; expected share@steps, for example "
                "groups=0.16@40+0.84@10"
            )
        groups.append((_number("share", share.strip(), policy), _whole("budget", budget.strip(), policy)))
    return tuple(groups)


def _whole(key: str, text: str, policy: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text):
        raise PolicyError(f"policy {policy!r}: {key} is {text!r}; expected a whole number of steps")
    return int(text)


def _number(key: str, text: str, policy: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PolicyError(
            f"policy {policy!r}: {key} is {text!r}; expected a number such as {key}=16"
        ) from None


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
