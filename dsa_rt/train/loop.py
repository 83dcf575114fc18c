"""What every training stage shares: a budget, a progress bar with a log of losses, resumable state, and EMA."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Loop:
    """Iterates over the steps of a stage until its budget is spent, saving state so that it can be resumed.

    The budget is a number of steps or of minutes, whichever is given (both: whichever ends first). ``modules`` and
    ``optimizers`` are restored from ``folder/state.pt`` when it exists. Minutes count over all runs of the stage.

        for step in loop: loop.log(loss=...)
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        state: dict[str, nn.Module | torch.optim.Optimizer | EMA],
        steps: int | None = None,
        minutes: float | None = None,
        save_every_seconds: float = 120.0,
        progress: bool | None = None,
    ) -> None:
        if steps is None and minutes is None:
            raise ValueError(f"stage {name}: give steps or minutes")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.state = folder, name, state
        self.steps, self.minutes, self.save_every = steps, minutes, save_every_seconds
        self.step, self.spent, self.progress = 0, 0.0, progress
        self._sums: dict[str, list[float]] = {}
        if self._state_path.exists():
            saved = torch.load(self._state_path, weights_only=True, map_location="cpu")
            self.step, self.spent = saved["step"], saved["spent"]
            for key, item in state.items():
                item.load_state_dict(saved["state"][key])

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.pt"

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent, 0 to 1: learning rates follow it."""
        parts = [0.0]
        if self.steps is not None:
            parts.append(self.step / self.steps)
        if self.minutes is not None:
            parts.append(self.spent / 60 / self.minutes)
        return min(1.0, max(parts))

    def __iter__(self) -> Iterator[int]:
        from tqdm import tqdm

        saved_at = last = time.perf_counter()
        shown = None if self.progress is None else not self.progress
        with tqdm(total=1000, initial=int(1000 * self.fraction), desc=self.name, disable=shown,
                  bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}") as bar:  # fmt: skip
            while self.fraction < 1:
                yield self.step
                self.step += 1
                now = time.perf_counter()
                self.spent, last = self.spent + now - last, now
                if self.step % 20 == 0:
                    means = {k: sum(v) / len(v) for k, v in self._sums.items()}
                    self._sums = {}
                    bar.n = int(1000 * self.fraction)
                    bar.set_postfix_str(f"step {self.step} " + " ".join(f"{k} {v:.4f}" for k, v in means.items()))
                    with (self.folder / "losses.jsonl").open("a") as log:
                        log.write(json.dumps({"step": self.step, "minutes": self.spent / 60, **means}) + "\n")
                if now - saved_at > self.save_every:
                    self.save()
                    saved_at = time.perf_counter()
        self.save()

    def log(self, **values: float | Tensor) -> None:
        """Values of this step; their means are written every 20 steps."""
        for key, value in values.items():
            self._sums.setdefault(key, []).append(float(value))

    def save(self) -> None:
        """Write the resumable state, atomically."""
        saved: dict[str, Any] = {"step": self.step, "spent": self.spent}
        saved["state"] = {key: item.state_dict() for key, item in self.state.items()}
        partial = self._state_path.with_suffix(".partial")
        torch.save(saved, partial)
        partial.replace(self._state_path)


class EMA:
    """Exponential moving average of a module's parameters, fp32; the decay warms up over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in self.module.state_dict().items():
            self.shadow[key].lerp_(value, 1 - keep)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.shadow = state["updates"], state["shadow"]


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` with all matrices of one shape in one batched product.

    On two CPU cores an update of the demo takes 50 ms in place of 124, of a training step of half a second.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same = group["params"]
            for p in same:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradient = torch.stack([p.grad for p in same])
            average = torch.stack([self.state[p]["momentum"] for p in same]).lerp_(gradient, 1 - group["momentum"])
            update = orthogonalize(gradient.lerp(average, group["momentum"]))
            rate = group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5
            for p, m, u in zip(same, average.unbind(), update.unbind(), strict=True):
                self.state[p]["momentum"].copy_(m)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=rate)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices of [n, rows, columns], roughly: Newton-Schulz in bf16 (Muon, Jordan 2024)."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).float()


def matrix_optimizers(module: nn.Module, learning_rate: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks, at AdamW's scale of update, and AdamW for all else."""
    matrices = [p for name, p in module.named_parameters() if "blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in module.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    return Muon(matrices, learning_rate), adamw


def cosine(fraction: float, peak: float, floor: float, warmup: float = 0.03) -> float:
    """Learning rate: linear warm-up, then a half cosine from ``peak`` to ``floor``."""
    import math

    if fraction < warmup:
        return peak * (fraction + 1e-3) / (warmup + 1e-3)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: torch.device | str) -> torch.autocast:
    """bf16 autocast: the precision all generator training runs in."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)
