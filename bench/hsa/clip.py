"""One clip to sample, what a sampling method is, and a meter on what it computes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import dsa_rt
from dsa_rt.cache import TextKV
from dsa_rt.errors import OptionError
from dsa_rt.models.wan import AttentionCache, WanModel
from dsa_rt.ops import step as ops
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.schedule import TRAIN_TIMESTEPS, euler_sigmas

STEPS = 40
"""Of the dense run that all others are compared with."""


@dataclass(frozen=True)
class Regime:
    """How the generator is sampled. guidance: 1 = none; shift: of the sigmas."""

    name: str
    guidance: float
    shift: float


@dataclass(frozen=True, eq=False)
class Clip:
    """Prompt, seed and regime, ready to be sampled. empty: the unconditional prompt, None without guidance."""

    model: WanModel
    grid: TokenGrid
    frames: range
    text: TextKV
    empty: TextKV | None
    regime: Regime
    seed: int

    @property
    def branches(self) -> int:
        """Forward passes of a step."""
        return 1 if self.empty is None else 2

    @cached_property
    def dense(self) -> ActiveSet:
        """All N tokens in their own order."""
        return frame_tokens(self.grid, self.frames, self.model.config.head_dim, per_frame=False)

    @property
    def tokens(self) -> int:
        return len(self.frames) * self.grid.tokens

    def sigmas(self, steps: int) -> list[float]:
        return euler_sigmas(steps, self.regime.shift)

    def noise(self) -> Tensor:
        """[1, N, P] fp32: the noise that the runtime's sampler starts from."""
        x = torch.empty(1, self.tokens, self.model.config.velocity_dim)
        ops.philox_normal(x, torch.tensor([self.seed]), self.dense.tokens, 0)
        return x

    def texts(self) -> list[TextKV]:
        """The prompt, and under guidance the empty one."""
        return [self.text] if self.empty is None else [self.text, self.empty]

    def timesteps(self, sigma: float) -> Tensor:
        return torch.full((1, 1), TRAIN_TIMESTEPS * sigma)

    def velocities(
        self, rows: Tensor, sigma: float, active: ActiveSet, caches: list[AttentionCache] | None = None
    ) -> list[Tensor]:
        """[1, A, P] fp32 of each branch."""
        timesteps = self.timesteps(sigma)
        return [
            self.model(rows, active, timesteps, text, None if caches is None else caches[i]).velocity.float()
            for i, text in enumerate(self.texts())
        ]

    def guided(self, branches: list[Tensor]) -> Tensor:
        """Classifier-free guidance over what :meth:`velocities` returned."""
        if len(branches) == 1:
            return branches[0]
        return branches[1] + self.regime.guidance * (branches[0] - branches[1])


class Method(Protocol):
    """A way to sample. A frozen dataclass, as it travels to other processes."""

    def __call__(self, clip: Clip) -> Tensor:
        """Latent rows [1, N, P] fp32."""


class Meter:
    """Counts, while it is entered, in how many forward passes of a model each token was computed.

    evaluated [N] int64: of both guidance branches together.
    """

    def __init__(self, model: WanModel, tokens: int) -> None:
        self.model, self.evaluated = model, torch.zeros(tokens, dtype=torch.int64)
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Meter:
        self._hook = self.model.register_forward_hook(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _count(self, module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        self.evaluated[arguments[1].tokens] += 1


@dataclass(frozen=True, eq=False)
class Run:
    """rows [1, N, P]; seconds of sampling, wall clock, nothing decoded; steps [N]: that computed each token."""

    rows: Tensor
    seconds: float
    steps: Tensor

    @property
    def share(self) -> float:
        """Tokens × layers evaluated, of those of :data:`STEPS` full steps."""
        return float(self.steps.double().mean()) / STEPS


def measure(method: Method, clip: Clip) -> Run:
    """Sample once."""
    with Meter(clip.model, clip.tokens) as meter, torch.no_grad():
        start = time.perf_counter()
        rows = method(clip)
        seconds = time.perf_counter() - start
    return Run(rows, seconds, meter.evaluated / clip.branches)


class Studio:
    """A loaded many-step bundle: prompts to clips, rows to frames."""

    def __init__(self, bundle: str, dtype: str) -> None:
        self.runtime = dsa_rt.load(bundle, dtype=dtype, verify_hashes=False)
        self.settings = self.runtime.compile(policy="dense").settings
        if self.settings.causal:
            raise OptionError(f"bundle '{bundle}' is a few-step one; HSA is for many-step ones, as 'demo-many-step' is")

    def clip(self, prompt: str, seed: int, regime: Regime) -> Clip:
        return Clip(
            self.runtime.model, self.settings.grid, range(self.settings.latent_frames), self._embed(prompt),
            None if regime.guidance == 1 else self._embed(""), regime, seed,
        )  # fmt: skip

    @torch.no_grad()
    def _embed(self, prompt: str) -> TextKV:
        return self.runtime.model.embed_text(self.runtime.text_encoder.encode([prompt]))

    @torch.no_grad()
    def decode(self, rows: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3], as the runtime makes them."""
        pixels = self.runtime.codec.stream_decoder().decode(self.settings.grid.unpatchify(rows))
        return pixels[0].float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)

    def own_regime(self, name: str) -> Regime:
        """The bundle's guidance and shift."""
        return Regime(name, self.runtime.manifest.guidance, self.runtime.manifest.schedule.shift)
