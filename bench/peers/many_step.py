"""Peers of many-step runs: diffusers' model step by step, and token skipping with gathers in plain modules."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers.plain_model import PlainWan, TextCache, turn
from dsa_rt.convert.names import to_diffusers
from dsa_rt.errors import OptionError
from dsa_rt.generate import Generate
from dsa_rt.models.wan import WanModel
from dsa_rt.ops import step as ops
from dsa_rt.policy import HSA
from dsa_rt.schedule import TRAIN_TIMESTEPS


@dataclass(frozen=True)
class PlainRun:
    """latents [C, F, h, w] fp32; seconds of denoising: noise, all steps, nothing else."""

    latents: Tensor
    seconds: float


def diffusers_model(model: WanModel) -> Any:
    """diffusers' WanTransformer3DModel with a generator's weights, on its device and in its dtype.

    :class:`OptionError` where diffusers is not installed.
    """
    try:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    except ImportError as error:
        raise OptionError("this peer needs diffusers: pip install 'dsa-rt[hf]'") from error
    config = model.config
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
            in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
            freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.layers, eps=config.eps,
        )  # fmt: skip
        rope = theirs.rope
    state = {name: tensor.clone() for name, tensor in to_diffusers(model.state_dict(), config.patch).items()}
    theirs.load_state_dict(state, assign=True)
    theirs.rope = type(rope)(config.head_dim, config.patch, 1024)  # a table, not a weight: it was made on meta
    return theirs.to(model.patch_embedding.weight.device).requires_grad_(False).eval()


@contextlib.contextmanager
def cudnn_attention(device: torch.device) -> Iterator[None]:
    """cuDNN's attention on CUDA, the fastest that diffusers can be told to take there; elsewhere nothing."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        yield


class DiffusersLoop:
    """A compiled many-step function's clip with diffusers' model: Euler steps under guidance, one pass for each
    branch, as its pipeline makes them. compiled: by ``torch.compile`` with its defaults."""

    def __init__(self, generate: Generate, *, compiled: bool = False) -> None:
        _check(generate)
        self.generate = generate
        self.model = diffusers_model(generate.runtime.model)
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model

    @torch.no_grad()
    def __call__(self, prompt: str, seed: int, negative_prompt: str = "") -> PlainRun:
        settings, runtime = self.generate.settings, self.generate.runtime
        texts = _texts(self.generate, prompt, negative_prompt)
        _wait(runtime.device)
        start = time.perf_counter()
        x = settings.grid.unpatchify(_noise(self.generate, seed))
        with cudnn_attention(runtime.device):
            for sigma, following in pairwise(settings.sigmas):
                timestep = torch.full((1,), TRAIN_TIMESTEPS * sigma, device=runtime.device)
                branches = [
                    self.forward(x.to(runtime.dtype), timestep, text, return_dict=False)[0].float() for text in texts
                ]
                x = x + (following - sigma) * _guided(branches, settings.guidance)
        _wait(runtime.device)
        return PlainRun(x[0], time.perf_counter() - start)


class FullCache:
    """K/V of all tokens, of every layer and branch; a step's fresh rows are scattered in. active [A] int64."""

    def __init__(self, model: PlainWan, tokens: int) -> None:
        config, weight = model.config, model.patch_embedding.weight
        shape = (config.layers, 1, tokens, config.heads, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self.active = torch.arange(tokens, device=weight.device)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k[layer].index_copy_(1, self.active, k)
        self.v[layer].index_copy_(1, self.active, v)
        return self.k[layer], self.v[layer]


class GatherLoop:
    """Token skipping as one writes it first: plain modules, active tokens gathered by ``index_select``, K/V of all
    tokens kept and scattered into, velocities of skipped tokens held. Which tokens a step computes is the policy's
    own choice, so that both compute the same; choosing costs next to nothing."""

    def __init__(self, generate: Generate) -> None:
        _check(generate)
        settings = generate.settings
        if not isinstance(settings.policy, HSA) or settings.policy.update != "held" or settings.token_plan is None:
            raise OptionError(
                f"policy {settings.policy.name}: the gather loop skips tokens of a many-step run and holds their "
                "velocities; expected a policy such as 'hsa-50'"
            )
        self.generate, self.policy, self.plan = generate, settings.policy, settings.token_plan
        self.model = PlainWan.of(generate.runtime.model)
        grid = settings.grid
        parts = [range(settings.latent_frames), range(grid.height), range(grid.width)]
        places = torch.cartesian_prod(*(torch.tensor(part) for part in parts)).unbind(-1)
        tables = [table[place] for table, place in zip(self.model.turns, places, strict=True)]
        self.table = torch.cat(tables, -1)[:, None].to(generate.runtime.device)
        branches = 2 if settings.guided else 1
        self.caches = [FullCache(self.model, self.plan.tokens) for _ in range(branches)]

    @torch.no_grad()
    def __call__(self, prompt: str, seed: int, negative_prompt: str = "") -> PlainRun:
        settings, runtime, plan = self.generate.settings, self.generate.runtime, self.plan
        texts = _texts(self.generate, prompt, negative_prompt)
        kept: list[TextCache] = [{} for _ in texts]
        _wait(runtime.device)
        start = time.perf_counter()
        x = _noise(self.generate, seed)
        velocity, scores = torch.zeros_like(x), torch.zeros(plan.tokens, device=x.device)
        everyone = torch.arange(plan.tokens, device=x.device)
        members: dict[int, Tensor] = {} if plan.scoring else self._members(seed, None)
        for step, (sigma, following) in enumerate(pairwise(settings.sigmas)):
            active = everyone
            if not plan.is_full(step):
                active = torch.cat([everyone[:0], *(members[group] for group in plan.active[step])]).sort().values
            if len(active):
                timesteps = torch.full((1, 1), TRAIN_TIMESTEPS * sigma, device=x.device)
                embedded = self.model.embed(settings.grid.unpatchify(x)).index_select(1, active)
                table = self.table.index_select(0, active)
                branches = []
                for text, cache, rows in zip(texts, self.caches, kept, strict=True):
                    cache.active = active
                    branches.append(self.model.transform(
                        embedded, timesteps, text, lambda part, table=table: turn(part, table), cache, rows
                    ).float())  # fmt: skip
                fresh = _guided(branches, settings.guidance)
                if step in plan.scoring:
                    change = (fresh - velocity[:, active]).abs().sum(-1) / fresh.abs().sum(-1).clamp_min(1e-30)
                    scores[active] += change[0]
                velocity.index_copy_(1, active, fresh)
            x = x + (following - sigma) * velocity
            if plan.scoring and step == plan.scoring[-1]:
                members = self._members(seed, scores)
        _wait(runtime.device)
        return PlainRun(settings.grid.unpatchify(x)[0], time.perf_counter() - start)

    def _members(self, seed: int, scores: Tensor | None) -> dict[int, Tensor]:
        """The tokens of each group."""
        everyone = torch.arange(self.plan.tokens).numpy()
        order = self.policy.order(self.plan, everyone, seed, None if scores is None else scores.cpu().numpy())
        placed = torch.from_numpy(order).to(self.table.device)
        return {group: placed[rows.start : rows.stop] for group, rows in self.plan.layout}


def _check(generate: Generate) -> None:
    if generate.settings.causal or generate.runtime.model_2 is not None:
        raise OptionError("this peer makes whole clips of a many-step bundle with one generator")


def _texts(generate: Generate, prompt: str, negative_prompt: str) -> list[Tensor]:
    """Text rows of each branch of guidance."""
    prompts = [prompt, negative_prompt] if generate.settings.guided else [prompt]
    return [generate.runtime.text_encoder.encode([text]).to(generate.runtime.dtype) for text in prompts]


def _noise(generate: Generate, seed: int) -> Tensor:
    """The runtime's noise, [1, N, P] fp32."""
    settings, runtime = generate.settings, generate.runtime
    tokens = torch.arange(settings.latent_frames * settings.grid.tokens, device=runtime.device)
    rows = torch.empty(1, len(tokens), runtime.model.config.velocity_dim, device=runtime.device)
    ops.philox_normal(rows, torch.tensor([seed], device=runtime.device), tokens, 0)
    return rows


def _guided(branches: list[Tensor], guidance: float) -> Tensor:
    if len(branches) == 1:
        return branches[0]
    with_prompt, without = branches
    return without + guidance * (with_prompt - without)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
