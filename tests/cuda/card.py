"""A CUDA card for the checks: why there is none, and the native module's ops on it.

    python -m cuda.card OP ROW

(in the folder tests) runs :func:`layer_checks.out_of_range` in this process, which is of no use to CUDA afterwards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsa_rt import _native


def missing() -> str:
    """Why CUDA kernels cannot run here, '' where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return "" if _native.build_info()["cuda"] else "the native module was built without CUDA kernels"


class Card:
    """The current device, on its current stream."""

    device = torch.device("cuda")

    def run(self, op: str, *arguments: Any) -> None:
        getattr(_native, op)(*arguments, stream=torch.cuda.current_stream().cuda_stream)


def seen_by_the_card(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy in page-locked host memory, which can be read after a trap, and the same memory as a CUDA tensor."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    class Interface:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": tuple(host.shape), "typestr": {torch.float32: "<f4", torch.int64: "<i8"}[host.dtype],
            "data": (host.data_ptr(), False), "version": 3,
        }  # fmt: skip

    return host, torch.as_tensor(Interface(), device="cuda")


def main() -> None:
    from . import layer_checks

    placed: list[tuple[Tensor, Tensor]] = []

    def place(tensor: Tensor) -> Tensor:
        host, on_card = seen_by_the_card(tensor)
        placed.append((tensor, host))
        return on_card

    def fails(call: Callable[[], None]) -> None:
        try:
            call()
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"stopped: {error}")
        else:
            raise AssertionError("the kernel ran through")
        for tensor, host in placed:
            tensor.copy_(host)

    layer_checks.out_of_range(Card(), sys.argv[1], int(sys.argv[2]), place, fails)
    print("nothing outside was touched")
    sys.stdout.flush()
    os._exit(0)  # the context is broken: no destructors


if __name__ == "__main__":
    main()
