"""The many-step sampler against a plain Euler loop, bit for bit, and against fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from plain_wan import plain_wan, token_positions
from tiny import make_model

from dsa_rt import reference
from dsa_rt.plan import TokenGrid, frame_tokens
from dsa_rt.sampler.ode import solve
from dsa_rt.schedule import euler_sigmas

GRID, FRAMES = TokenGrid(3, 2), range(3)


@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_euler_with_guidance(guidance: float, steps: int) -> None:
    model = make_model(4, form="bidirectional")
    state, tokens = model.state_dict(), len(FRAMES) * GRID.tokens
    prompt, nothing = torch.randn(1, 7, 20), torch.randn(1, 7, 20)
    text, empty = model.embed_text(prompt), model.embed_text(nothing)
    sigmas = euler_sigmas(steps, 5.0)
    reported: list[tuple[int, float | None]] = []
    checks: list[int] = []
    done = solve(
        model, GRID, FRAMES, text, None if guidance == 1.0 else empty, sigmas, guidance, 77,
        lambda number, confidence: reported.append((number, confidence)), lambda: checks.append(len(reported)),
    )  # fmt: skip

    active = frame_tokens(GRID, FRAMES, 24, per_frame=False)
    x = reference.philox_normal(torch.tensor([77]), torch.arange(tokens), 12, 0)
    exact, positions = x.double(), token_positions(list(FRAMES), 3, 2)
    for sigma, following in pairwise(sigmas):
        timestep = torch.full((1, 1), 1000 * sigma)
        velocity = model(x, active, timestep, text).velocity
        if guidance != 1.0:
            without = model(x, active, timestep, empty).velocity
            velocity = without + guidance * (velocity - without)
        x = x + (following - sigma) * velocity
        times = torch.full((1, tokens), 1000 * sigma)
        conditional, _ = plain_wan(state, 2, exact, positions, times, prompt)
        unconditional, _ = plain_wan(state, 2, exact, positions, times, nothing)
        exact = exact + (following - sigma) * (unconditional + guidance * (conditional - unconditional))
    assert torch.equal(done.x0, x)
    assert (done.x0 - exact).abs().max() < 5e-4 * exact.abs().max()
    assert reported == [(number + 1, None) for number in range(steps)]
    assert checks == list(range(steps))  # before every step
    assert (done.index, done.frames, done.passes, done.confidences) == (0, FRAMES, steps, (None,) * steps)
    assert done.threshold is None and done.milliseconds()[1] == 0


def test_cancelled_between_steps() -> None:
    model = make_model(4, form="bidirectional")
    text = model.embed_text(torch.randn(1, 7, 20))
    reported: list[int] = []

    def check() -> None:
        if len(reported) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(model, GRID, FRAMES, text, None, euler_sigmas(9, 5.0), 1.0, 0, lambda n, _: reported.append(n), check)
    assert reported == [1, 2]
