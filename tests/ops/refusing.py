"""A call with bad arguments, for the tests of what ops refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_rt.errors import ShapeError


def refused_by(
    function: Callable[..., None], arguments: dict[str, Any], *fragments: str, error: type[Exception] = ShapeError
) -> None:
    """The call fails on every backend with a message that holds the fragments, and no argument changes."""
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    for backend in (None, "torch"):
        with pytest.raises(error) as caught:
            function(**arguments, backend=backend)
        assert str(caught.value).startswith(f"{function.__name__}: ")
        for fragment in fragments:
            assert fragment in str(caught.value)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was written"
