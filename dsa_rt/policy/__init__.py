"""How much is computed: passes per chunk (dense, fixed, DSA as printed or calibrated), tokens per step (HSA)."""

from dsa_rt.policy.base import Decider, Policy
from dsa_rt.policy.calibration import Calibration, fit_calibration
from dsa_rt.policy.dsa import DSA
from dsa_rt.policy.fixed import Fixed
from dsa_rt.policy.hsa import HSA
from dsa_rt.policy.names import NAMES, parse_policy
from dsa_rt.policy.records import Records
from dsa_rt.policy.simulate import oracle, random_allocation, simulate
from dsa_rt.policy.steps import StepPlan
from dsa_rt.policy.targets import Cost, clip_budget, passes_for_fps

__all__ = [
    "DSA",
    "HSA",
    "NAMES",
    "Calibration",
    "Cost",
    "Decider",
    "Fixed",
    "Policy",
    "Records",
    "StepPlan",
    "clip_budget",
    "fit_calibration",
    "oracle",
    "parse_policy",
    "passes_for_fps",
    "random_allocation",
    "simulate",
]
