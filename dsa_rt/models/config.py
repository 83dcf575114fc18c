"""Sizes of a Wan generator, as a manifest has them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dsa_rt.bundle.strict import OPTIONAL
from dsa_rt.errors import OptionError


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one generator. ``form`` says how it was trained: "causal" (per-frame) or "bidirectional".

    image_dim: width of the CLIP rows that Wan 2.1 image-to-video reads, None for all others. q and k are always
    normalised and cross-attention has its affine norm, as in every published Wan.
    """

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    in_channels: int
    out_channels: int
    text_dim: int
    text_length: int
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    form: str = "bidirectional"
    image_dim: int | None = field(default=None, metadata=OPTIONAL)  # manifests without one do not mention it

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        for name in ("dim", "ffn_dim", "heads", "layers", "in_channels", "out_channels", "text_dim", "text_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise OptionError(f"generator {name} is {getattr(self, name)!r}; expected a positive integer")
        if self.image_dim is not None and (type(self.image_dim) is not int or self.image_dim < 1):
            raise OptionError(f"generator image_dim is {self.image_dim!r}; expected a positive integer or None")
        if self.dim % self.heads or self.head_dim % 2:
            raise OptionError(f"generator dim {self.dim} does not split into {self.heads} heads of even size")
        if self.freq_dim % 2:
            raise OptionError(f"generator freq_dim is {self.freq_dim}; expected an even number")
        if len(self.patch) != 3 or self.patch[0] != 1 or any(type(n) is not int or n < 1 for n in self.patch):
            raise OptionError(f"generator patch is {self.patch}; expected (1, rows, columns)")
        if self.form not in ("causal", "bidirectional"):
            raise OptionError(f'generator form is {self.form!r}; expected "causal" or "bidirectional"')

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def patch_dim(self) -> int:
        """Values of an input row."""
        return math.prod(self.patch) * self.in_channels

    @property
    def velocity_dim(self) -> int:
        """Values of an output row, and of the noise in an input row."""
        return math.prod(self.patch) * self.out_channels

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; image_dim only where there is one."""
        values = asdict(self) | {"patch": list(self.patch)}
        if self.image_dim is None:
            del values["image_dim"]
        return values
