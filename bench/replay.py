"""What a call of an op costs through Python, and in a replay: tiny rows, so that the kernel is little of it.

    python -m bench.replay

Every op on 48 rows of 192 values (the demo's smallest pass), alone and as 100 calls in one program. Samples of the two
take turns; a figure is a median. ``checks``: rows of large passes that a replay reads again, beside the op that moves
them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from bench import common
from bench.ops import DTYPES, LAYER_OPS, OPS, seconds
from dsa_rt.ops import attention, rows
from dsa_rt.recording import Recorded, record
from dsa_rt.reference import layers as reference

ROWS, LAYER, CALLS = (1, 48, 192), (1, 48, 3, 64), 100
CHECKS = {"336 of 2688 rows": (336, 2688), "4680 of 32760 rows": (4680, 32760)}


def calls(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """A native call of every op, by name."""
    made = {name: case(ROWS, dtype).native for name, case in OPS.items()}
    made |= {name: case(LAYER, dtype).native for name, case in LAYER_OPS.items()}
    q, k, v = (torch.randn(LAYER).to(dtype) for _ in range(3))
    out, ((k8, k_scale), (v8, v_scale)) = torch.empty_like(q), (reference.quantize_rows(x) for x in (k, v))
    return made | {
        "active_attention": lambda: attention.active_attention(out, q, k, v, backend="native"),
        "active_attention_fp8": lambda: attention.active_attention_fp8(
            out, q, k8, v8, k_scale, v_scale, backend="native"
        ),
    }


def times(call: Callable[[], None], repeats: int = CALLS) -> Recorded:
    """A program that makes the call several times."""

    def function() -> None:
        for _ in range(repeats):
            call()

    found = record("cpu", function)
    if found.kind != "program":
        raise RuntimeError(found.reason)
    return found


def measure(call: Callable[[], None], samples: int) -> dict[str, float]:
    """Microseconds of one call, both ways."""
    recorded = times(call)
    taken = [(seconds(call, 1), seconds(recorded.replay, 1) / CALLS) for _ in range(samples)]
    python, replay = (1e6 * statistics.median(column) for column in zip(*taken, strict=True))
    return {"python_us": python, "replay_us": replay, "overhead_us": python - replay}


def measure_check(active: int, total: int, samples: int) -> dict[str, float]:
    """Microseconds of a scatter of single bytes to distinct rows, almost all of it the check, and of bf16 rows of 1536
    values."""
    chosen = torch.randperm(total)[:active]
    x, src = torch.empty(1, total, 1, dtype=torch.uint8), torch.empty(1, active, 1, dtype=torch.uint8)
    wide, wide_src = torch.empty(1, total, 1536, dtype=torch.bfloat16), torch.zeros(1, active, 1536).bfloat16()
    check = times(lambda: rows.scatter_rows(x, chosen, src, backend="native"))
    move = times(lambda: rows.scatter_rows(wide, chosen, wide_src, backend="native"), 1)
    return {
        "check_us": 1e6 * seconds(check.replay, samples) / CALLS, "move_us": 1e6 * seconds(move.replay, samples),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``replay.json``."""
    parse = common.parser("replay", "A call of an op through Python and in a replay.", bundle=None)
    parse.add_argument("--samples", type=common.positive, default=15, help="samples of about 10 ms for each figure")
    options = parse.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = common.fingerprint(
        "replay", options, warm_up="as many calls as one sample has (10 ms)",
        included=["python: dsa_rt.ops, choice of the backend, dispatch, checks, kernel",
                  "replay: kernel, and rows and segments read again"],
    )  # fmt: skip
    with torch.no_grad():
        found = {
            f"{name}, {kind}": measure(call, options.samples)
            for kind, dtype in DTYPES.items()
            for name, call in calls(dtype).items()
        }
        checks = {name: measure_check(*size, options.samples) for name, size in CHECKS.items()}
    result |= {"rows": found, "checks": checks}
    print(common.table(
        ["op, dtype", "Python µs", "replay µs", "saved µs"],
        [[name, *(common.figure(row[key], 2) for key in row)] for name, row in found.items()],
    ))  # fmt: skip
    print(common.table(
        ["distinct rows", "check µs", "op on 1536 bf16 µs"],
        [[name, *(common.figure(row[key]) for key in row)] for name, row in checks.items()],
    ))  # fmt: skip
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", common.show_path(common.write_json(options.out, "replay.json", result)))
    return 0


if __name__ == "__main__":
    sys.exit(common.run(main))
