"""Runs all interpreted cases and prints what :func:`cases.measure` found as JSON; for a process with
``TRITON_INTERPRET=1``, which Triton reads when a kernel is decorated."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    import triton

    from triton_kernels.cases import measure
    from triton_kernels.interpreted import CASES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, for infinities that are meant
    assert triton.knobs.runtime.interpret
    asked = set(sys.argv[1:])
    results: dict[str, dict[str, float] | str] = {}
    for case in CASES:
        if asked and case.id not in asked:
            continue
        try:
            results[case.id] = {check.output: check.error for check in measure(case, "cpu")}
        except Exception:
            results[case.id] = traceback.format_exc()
    print(json.dumps(results))
