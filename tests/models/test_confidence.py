"""The confidence head against a plain transcription of its description, with the framework's attention module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, randomise
from torch import Tensor

from dsa_rt.arena import Arena
from dsa_rt.errors import OptionError
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.plan import TokenGrid, frame_tokens


def plain_head(state: dict[str, Tensor], heads: int, taps: list[Tensor], eps: float = 1e-6) -> Tensor:
    """norm of tokens and query -> Q, K, V -> qk-norm -> attention -> output projection (+ query) -> norm -> MLP
    (+ residual), joined -> LayerNorm -> Linear -> SiLU -> Linear; V is projected for every token. In fp64."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    joined = []
    for number, tokens in enumerate(taps):
        block = f"blocks.{number}"
        dim = tokens.shape[-1]
        query = w[f"{block}.query"].expand(len(tokens), 1, dim)
        tokens = norm(f"{block}.norm_tokens", tokens.double())
        q, k = linear(f"{block}.q", norm(f"{block}.norm_query", query)), linear(f"{block}.k", tokens)
        q = F.rms_norm(q, (dim,), w[f"{block}.norm_q.weight"], eps)
        k = F.rms_norm(k, (dim,), w[f"{block}.norm_k.weight"], eps)
        v = linear(f"{block}.v", tokens)
        identity, nothing = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        attended, _ = F.multi_head_attention_forward(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), dim, heads, None, nothing.repeat(3), None, None,
            False, 0.0, w[f"{block}.o.weight"], w[f"{block}.o.bias"], use_separate_proj_weight=True,
            q_proj_weight=identity, k_proj_weight=identity, v_proj_weight=identity,
        )  # fmt: skip
        x = query + attended.transpose(0, 1)
        hidden = F.gelu(linear(f"{block}.ffn.0", norm(f"{block}.norm", x)))
        joined.append((x + linear(f"{block}.ffn.2", hidden))[:, 0])
    x = norm("norm", torch.cat(joined, -1))
    return linear("out.2", F.silu(linear("out.0", x)))[:, 0]


@pytest.mark.parametrize(
    ("dim", "heads", "taps", "tokens"), [(48, 2, (0, 1), 13), (24, 3, (2,), 1), (64, 1, (0, 3, 4), 40)]
)
def test_head_against_plain_transcription(dim: int, heads: int, taps: tuple[int, ...], tokens: int) -> None:
    head = ConfidenceHead(ConfidenceConfig(dim, heads, 2 * dim + 1, taps))
    randomise(head, dim + heads)
    hidden = [3 * torch.randn(3, tokens, dim) + 0.5 for _ in taps]
    logit = head(hidden)
    expected = plain_head(head.state_dict(), heads, hidden)
    assert logit.shape == (3,) and logit.dtype == torch.float32
    assert expected.std() > 1e-2  # it does depend on the sample
    assert (logit - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "heads", "taps", "tokens"), [(48, 2, (0, 1), 13), (24, 3, (2,), 1), (64, 1, (0, 3, 4), 40)]
)
def test_judging_against_plain_transcription(
    dtype: torch.dtype, dim: int, heads: int, taps: tuple[int, ...], tokens: int
) -> None:
    """The prepared head, in memory that is full of NaN, sample by sample; again in the same memory."""
    head = ConfidenceHead(ConfidenceConfig(dim, heads, 2 * dim + 1, taps))
    randomise(head, dim + heads)
    head.to(dtype).requires_grad_(False).prepare()
    hidden = [(3 * torch.randn(3, tokens, dim) + 0.5).to(dtype) for _ in taps]
    expected = plain_head(head.state_dict(), heads, hidden)
    arena = Arena()
    for _ in range(2):
        with torch.no_grad():
            logits = [head.judge([tap[n : n + 1] for tap in hidden], arena).clone() for n in range(3)]
        assert all(logit.shape == (1,) and logit.dtype == dtype for logit in logits)
        error = (torch.cat(logits).double() - expected).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.05 * expected.abs().max() + 0.05)
        for buffer in arena._held.values():
            buffer.fill_(torch.nan)


def test_head_takes_its_taps_from_the_generator() -> None:
    """Taps are outputs of the blocks named, in rising order, whatever order the caller names them in."""
    model = make_model(1, layers=3)
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (0, 2)))
    randomise(head, 4)
    grid = TokenGrid(2, 2)
    active = frame_tokens(grid, range(3), 24, per_frame=True)
    rows, text = torch.randn(2, 12, 12), model.embed_text(torch.randn(2, 7, 20))
    sigma = torch.full((2, 3), 500.0)
    every = model(rows, active, sigma, text, taps=(0, 1, 2)).taps
    assert len(every) == 3
    picked = model(rows, active, sigma, text, taps=head.config.taps)
    assert torch.equal(picked.taps[0], every[0]) and torch.equal(picked.taps[1], every[2])
    assert torch.equal(picked.velocity, model(rows, active, sigma, text).velocity)
    assert not torch.equal(head(picked.taps), head(every[:2]))


def test_head_does_not_see_the_order_of_tokens() -> None:
    head = ConfidenceHead(ConfidenceConfig(24, 2, 32, (1,)))
    randomise(head, 8)
    tokens = torch.randn(2, 30, 24)
    torch.testing.assert_close(head([tokens]), head([tokens[:, torch.randperm(30)]]))


def test_head_trains() -> None:
    """Every parameter of the head gets a gradient, and the hidden states too."""
    head = ConfidenceHead(ConfidenceConfig(24, 2, 32, (0, 1)))
    randomise(head, 8)
    taps = [torch.randn(2, 6, 24, requires_grad=True) for _ in range(2)]
    head(taps).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(tap.grad.abs().max() > 0 for tap in taps)


def test_head_refuses_another_number_of_taps() -> None:
    head = ConfidenceHead(ConfidenceConfig(24, 2, 32, (0, 1)))
    with pytest.raises(ValueError):
        head([torch.randn(1, 3, 24)])


@pytest.mark.parametrize("taps", [(), (1, 0), (1, 1), (-1, 2)])
def test_wrong_taps(taps: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="taps are .*rising"):
        ConfidenceConfig(48, 2, 64, taps)


def test_wrong_heads() -> None:
    with pytest.raises(OptionError, match="48 does not split into 5"):
        ConfidenceConfig(48, 5, 64, (0,))
