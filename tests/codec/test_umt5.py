"""Wan's text encoder against diffusers' pipeline, on small random weights and a small tokenizer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from published import TEXT_DIM, WORDS, pipeline, text_encoder, tokenizer

from dsa_rt.bundle.strict import parse
from dsa_rt.codec import TextEncoder
from dsa_rt.codec.umt5 import Umt5Config, Umt5TextEncoder, clean, read_tokenizer
from dsa_rt.errors import BundleError, OptionError, PromptError

ODD = ["", " ", "a red\u00a0ball", "a\n\tred   ball ", "cat &amp; ball", "cat &amp;amp; ball", "&lt;pad&gt;",
       "It\u2019s a cat", "schÃ¶n", "ﬁne", "“quoted”", "\u3000a\u2003b\x1c", "日本語 の 猫", "a</s>b",
       "\ufeffa", "e\u0301"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(folder)
    return Path(folder / "tokenizer.json").read_bytes()


def make(tokenizer_json: bytes, seed: int = 2, **changes: Any) -> Umt5TextEncoder:
    theirs = text_encoder(seed)
    config = parse(Umt5Config, Umt5Config.from_transformers(theirs.config.to_dict(), 512), "config")
    ours = Umt5TextEncoder(replace(config, **changes), tokenizer_json)
    ours.encoder.load_state_dict(theirs.encoder.state_dict())
    return ours.requires_grad_(False).eval()


@pytest.mark.parametrize("prompt", ODD)
def test_prompts_are_cleaned_as_the_pipeline_does(prompt: str) -> None:
    assert clean(prompt) == prompt_clean(prompt)


def test_random_text_is_cleaned_as_the_pipeline_does() -> None:
    letters = "ab \t\n&;#<>é’\u00a0\u2028\x85Ã¶"
    for _ in range(200):
        text = "".join(letters[i] for i in torch.randint(len(letters), (int(torch.randint(30, ())),)))
        assert clean(text) == prompt_clean(text), repr(text)


def test_rows_equal_the_pipelines(tokenizer_json: bytes) -> None:
    theirs = pipeline("t2v")
    ours = make(tokenizer_json)
    prompts = [*ODD, " ".join(WORDS[3:] * 30)]
    with torch.no_grad():
        expected = theirs.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    rows = ours.encode(prompts)
    assert rows.shape == (len(prompts), 512, TEXT_DIM) and expected.abs().max() > 0.1
    assert torch.equal(rows, expected)
    lengths = (rows != 0).any(-1).sum(1)
    assert lengths[0] == 1 and lengths[-1] > 300  # the end's token alone; and a long one
    assert len({tuple(row.flatten().tolist()) for row in rows}) > 10  # prompts differ


def test_a_prompt_does_not_depend_on_its_neighbours(tokenizer_json: bytes) -> None:
    ours = make(tokenizer_json)
    together = ours.encode(["a red ball", "blue", "a cat on grass bouncing and bouncing"])
    assert (ours.encode(["blue"])[0] - together[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("words", [510, 511, 512, 600])
def test_too_long(tokenizer_json: bytes, words: int) -> None:
    """511 words and the end's token fit; where WanPipeline cuts, this refuses."""
    ours = make(tokenizer_json)
    prompt = " ".join(["cat"] * words)
    if words <= 511:
        assert (ours.encode([prompt]) != 0).any(-1).sum() == words + 1
        return
    with pytest.raises(PromptError, match=f"'cat cat .* has {words + 1} tokens; this text encoder reads 512"):
        ours.encode(["cat", prompt])


def test_truncation_and_padding_in_the_file_do_not_count(tokenizer_json: bytes) -> None:
    value = json.loads(tokenizer_json)
    value["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    prompts = ["a red ball bouncing on grass", "cat"]
    changed = make(json.dumps(value).encode())
    assert torch.equal(changed.encode(prompts), make(tokenizer_json).encode(prompts))


def test_is_a_text_encoder(tokenizer_json: bytes) -> None:
    ours = make(tokenizer_json)
    assert isinstance(ours, TextEncoder) and (ours.kind, ours.dim, ours.length) == ("umt5", TEXT_DIM, 512)
    assert parse(Umt5Config, ours.to_dict(), "config") == ours.config
    assert ours.assets() == {"tokenizer": tokenizer_json}
    assert ours.dtype_for(torch.float16) == ours.dtype_for(torch.bfloat16) == torch.bfloat16
    assert ours.dtype_for(torch.float32) == torch.float32


def test_bf16(tokenizer_json: bytes) -> None:
    exact, rough = make(tokenizer_json).encode(["a red ball"]), make(tokenizer_json).bfloat16().encode(["a red ball"])
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().max() < 0.05 * exact.abs().max()
    assert torch.equal((rough != 0).any(-1), (exact != 0).any(-1))


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"version": "1.0"}'])
def test_damaged_tokenizers(data: bytes) -> None:
    with pytest.raises(BundleError, match="tokenizer.json cannot be read"):
        read_tokenizer(data, 40)


def test_a_tokenizer_of_another_encoder(tokenizer_json: bytes) -> None:
    read_tokenizer(tokenizer_json, len(WORDS))
    with pytest.raises(BundleError, match=f"has token {len(WORDS) - 1}, but the text encoder knows {len(WORDS) - 1}"):
        read_tokenizer(tokenizer_json, len(WORDS) - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; expected 1 to 512"), ({"length": 0}, "length is 0"),
        ({"pad_token_id": 40}, "pad_token_id is 40; expected one of 40"),
        ({"feed_forward_proj": "gated-evil"}, "feed_forward_proj is 'gated-evil'"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(tokenizer_json: bytes, change: dict[str, Any], message: str) -> None:
    config = make(tokenizer_json).config
    with pytest.raises(OptionError, match=message):
        replace(config, **change)


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "ftfy"])
def test_without_its_packages(tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    ours = make(tokenizer_json)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=rf"\(UMT5\) needs the package {package} .*pip install 'dsa-rt\[hf\]'"):
        Umt5TextEncoder(ours.config, tokenizer_json).encode(["cat"])
