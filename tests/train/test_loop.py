"""The batched Muon against the one of PyTorch; the loop's budget and its resumption."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dsa_rt.train.loop import Loop, Muon


def test_batched_muon_steps_like_pytorch() -> None:
    matrices = [torch.randn(s) for s in ((12, 12), (12, 12), (20, 12), (12, 20))]
    theirs, ours = ([nn.Parameter(m.clone()) for m in matrices] for _ in range(2))
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    batched = Muon(ours, lr=0.02, weight_decay=0.01)
    for _ in range(4):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        reference.step()
        batched.step()
    for a, b, m in zip(theirs, ours, matrices, strict=True):
        moved = (a - m).abs().max()
        assert moved > 0.01
        assert (a - b).abs().max() < 0.02 * moved  # Newton-Schulz runs in bf16


def test_a_resumed_loop_goes_on_with_the_same_weights_and_momentum(tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> nn.Linear:
        torch.manual_seed(0)
        model = nn.Linear(6, 6)
        optimizer = Muon([model.weight], lr=0.1)
        loop = Loop(folder, "test", state={"model": model, "optimizer": optimizer}, steps=steps, progress=False)
        for step in loop:
            model.weight.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return model

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6)
    assert torch.equal(whole.weight, resumed.weight)
