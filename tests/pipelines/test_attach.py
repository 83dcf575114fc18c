"""attach: whole calls of diffusers' Wan pipelines, against themselves and against dsa_rt's own sampler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from published import pipeline
from tiny_diffusers import TEXT_DIM
from torch import Tensor, nn

import dsa_rt
from dsa_rt.errors import OptionError
from dsa_rt.policy import HSA

from .cases import FORMS, GROUPS, HSA_8, SEED, TOKENS, close, make, noise, solved


@pytest.mark.parametrize("form", FORMS)
def test_dense_runs_equal_the_pipeline(form: str) -> None:
    """Dense, and with every budget at T; after detach the pipeline is what it was, to the bit."""
    case = make(form)
    expected = case(num_inference_steps=4)
    before = [(case.pipe.transformer, case.pipe.transformer_2), set(vars(case.pipe)), dict(case.pipe.config)]
    states = [dict(vars(model)) for model in before[0] if model is not None]
    for policy in ("dense", HSA(((0.3, 4), (0.7, 4)), window=0.5)):
        dsa_rt.attach(case.pipe, policy)
        close(case(num_inference_steps=4), expected, 1e-4)
        assert dsa_rt.attached(case.pipe).last_run.active_tokens == (TOKENS,) * 4
        dsa_rt.detach(case.pipe)
    assert case.pipe.transformer is before[0][0] and case.pipe.transformer_2 is before[0][1]
    assert set(vars(case.pipe)) == before[1] and dict(case.pipe.config) == before[2]
    for model, state in zip(filter(None, before[0]), states, strict=True):
        assert vars(model).keys() == state.keys() and all(vars(model)[key] is state[key] for key in state)
    assert torch.equal(case(num_inference_steps=4), expected)


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("t2v", {}),
        ("t2v", {"update": "extrapolated"}),
        ("t2v", {"selection": "random"}),
        ("a14b-t2v", {"update": "extrapolated"}),
        ("i2v", {"selection": "uniform"}),
        ("a14b-i2v", {}),
        ("ti2v", {}),
        ("ti2v", {"selection": "random-first-frame", "update": "extrapolated"}),
    ],
)
def test_hsa_equals_our_sampler(form: str, changes: dict[str, Any]) -> None:
    case, policy = make(form), HSA(GROUPS, **({"window": 0.5} | changes))
    expected, dense = solved(case, policy), case()
    dsa_rt.attach(case.pipe, policy, seed=SEED)
    result = case()
    close(result, expected, 1e-5)
    assert (result - dense).abs().max() > 1e-2  # tokens were skipped
    counts = dsa_rt.attached(case.pipe).last_run.active_tokens
    full = {0, 1, 4, 6, 7} | ({3} if "a14b" in form else set())  # at step 3 sigma falls below 0.875
    assert {step for step, count in enumerate(counts) if count == TOKENS} == full


def test_without_guidance() -> None:
    """One branch, and noise from the pipeline's generator."""
    case = make()
    arguments = {"guidance_scale": 1.0, "latents": None}
    dense = case(**arguments, generator=torch.Generator().manual_seed(5))
    expected = solved(case, HSA_8, guidance_scale=1.0)
    dsa_rt.attach(case.pipe, HSA_8)
    close(case(guidance_scale=1.0), expected, 1e-5)
    dsa_rt.detach(case.pipe)
    dsa_rt.attach(case.pipe, "dense")
    close(case(**arguments, generator=torch.Generator().manual_seed(5)), dense, 1e-4)


def test_whole_steps_are_skipped() -> None:
    """A single group: against diffusers' transformer, called by hand every second step inside the window."""
    case = make()
    pipe, text, empty = case.pipe, case.arguments["prompt_embeds"], case.arguments["negative_prompt_embeds"]
    pipe.scheduler.set_timesteps(8)
    x, velocity, calls = case.arguments["latents"], torch.tensor(torch.nan), 0
    with torch.no_grad():
        for step, (sigma, following) in enumerate(pairwise(pipe.scheduler.sigmas)):
            if step < 2 or step >= 6 or step % 2 == 0:
                t = 1000 * sigma[None]
                wanted, other = (pipe.transformer(x, t, rows, return_dict=False)[0] for rows in (text, empty))
                velocity, calls = other + 3.0 * (wanted - other), calls + 1
            x = x + (following - sigma) * velocity
    dsa_rt.attach(pipe, HSA(((1.0, 4),), window=0.5, steps=8))
    close(case(), x, 1e-4)
    assert calls == 6 and dsa_rt.attached(pipe).last_run.token_step_share == 6 / 8


def test_callbacks() -> None:
    """They see the latents of every step and may change them, and the text: given anew, or in place."""
    case, other = make(), torch.randn(1, 9, TEXT_DIM)

    def called(seen: list[Tensor], in_place: bool) -> Callable[..., dict[str, Any]]:
        def callback(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(values["latents"].clone())
            if step == 2:
                return {"latents": values["latents"].flip(-1)}
            if step == 4 and in_place:
                values["prompt_embeds"].copy_(other)
            return {"prompt_embeds": other.clone()} if step == 4 and not in_place else {}

        return callback

    for in_place in (False, True):
        runs: list[list[Tensor]] = [[], []]
        for number, seen in enumerate(runs):
            if number:
                dsa_rt.attach(case.pipe, "dense")
            case(
                callback_on_step_end=called(seen, in_place), prompt_embeds=case.arguments["prompt_embeds"].clone(),
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            )  # fmt: skip
        dsa_rt.detach(case.pipe)
        assert len(runs[0]) == 8
        for expected, result in zip(*runs, strict=True):
            close(result, expected, 1e-4)


def test_guidance_that_ends_early() -> None:
    """A callback may switch guidance off; on again only where all tokens are computed."""
    case = make()

    def switched(off: int, on: int) -> Callable[..., dict[str, Any]]:
        def callback(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            pipe._guidance_scale = 1.0 if off <= step < on else 3.0
            return {}

        return callback

    expected = case(callback_on_step_end=switched(3, 9))
    dsa_rt.attach(case.pipe, HSA(((0.3, 8), (0.7, 8)), window=0.5))
    close(case(callback_on_step_end=switched(3, 9)), expected, 1e-4)
    dsa_rt.detach(case.pipe)
    dsa_rt.attach(case.pipe, HSA_8)
    assert torch.isfinite(case(callback_on_step_end=switched(1, 3))).all()  # on again at step 4, which is full
    with pytest.raises(OptionError, match="guidance is on at step 5, but was off before"):
        case(callback_on_step_end=switched(1, 4))
    with pytest.raises(OptionError, match="guidance is on at step 3, but was off before"):
        case(guidance_scale=1.0, callback_on_step_end=switched(0, 2))


class Words(nn.Module):
    """A text encoder: a row for each letter."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(128, TEXT_DIM)

    def tokenizer(self, texts: list[str], max_length: int, **_: Any) -> SimpleNamespace:
        ids = torch.tensor([[ord(letter) for letter in text.ljust(max_length)] for text in texts])
        mask = torch.tensor([[int(n < len(text)) for n in range(max_length)] for text in texts])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    def forward(self, ids: Tensor, mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.rows(ids))


def test_batches() -> None:
    """Two prompts, two videos of each: every sample is the run of its own, groups included."""
    case = make()
    case.pipe.text_encoder = words = Words()
    case.pipe.tokenizer = words.tokenizer
    latents = torch.cat([noise(16, seed) for seed in range(4)])
    plain = {"prompt_embeds": None, "negative_prompt_embeds": None, "max_sequence_length": 9}
    batch = plain | {"prompt": ["a ball", "two kites"], "num_videos_per_prompt": 2, "latents": latents}
    expected = case(**batch)
    dsa_rt.attach(case.pipe, "dense")
    close(case(**batch), expected, 1e-4)
    for policy in (HSA_8, HSA(GROUPS, window=0.5, selection="random", update="extrapolated")):
        dsa_rt.detach(case.pipe)
        dsa_rt.attach(case.pipe, policy)
        together = case(**batch)
        assert dsa_rt.attached(case.pipe).last_run.batch == 4
        for number, prompt in enumerate(("a ball", "a ball", "two kites", "two kites")):
            dsa_rt.detach(case.pipe)
            dsa_rt.attach(case.pipe, policy, seed=number)
            alone = case(**plain, prompt=prompt, latents=latents[number : number + 1])
            close(together[number : number + 1], alone, 1e-5)


def test_prompts_of_more_than_512_tokens() -> None:
    """The pipeline's own text encoding stays: it drops what is too long."""
    pipe = pipeline("t2v")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    words = (["a", "red", "ball", "on", "grass", "and"] * 100)[:570]

    def run(count: int) -> Tensor:
        arguments = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
        return pipe(" ".join(words[:count]), **arguments, generator=torch.Generator().manual_seed(4)).frames

    expected = run(570)
    assert torch.equal(expected, run(511)) and (expected - run(9)).abs().max() > 1e-3  # 511 words and the end of text
    dsa_rt.attach(pipe, "dense")
    close(run(570), expected, 1e-4)


@pytest.mark.parametrize(("form", "dtype"), [("t2v", torch.bfloat16), ("i2v", torch.float16)])
def test_sixteen_bits_with_parts_in_fp32(form: str, dtype: torch.dtype) -> None:
    """As loaded with torch_dtype=dtype: no further from the fp32 run than diffusers itself is."""
    case = make(form)
    exact = case(num_inference_steps=4)
    model = case.pipe.transformer
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    plain = case(num_inference_steps=4)
    dsa_rt.attach(case.pipe, "dense")
    result = case(num_inference_steps=4)
    assert result.dtype == plain.dtype == dtype
    error, bound = (result - exact).square().mean().sqrt(), (plain - exact).square().mean().sqrt()
    assert 0 < error < 1.3 * bound
    dsa_rt.detach(case.pipe)
    dsa_rt.attach(case.pipe, HSA(((0.5, 4), (0.5, 2)), window=1.0, selection="random"), kv_storage="fp8")
    assert torch.isfinite(case(num_inference_steps=4)).all()
