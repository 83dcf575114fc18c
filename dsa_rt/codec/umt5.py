"""Wan's text encoder: transformers' UMT5 encoder and its tokenizer, as diffusers' ``WanPipeline`` uses them.

A prompt is cleaned (broken encodings and HTML entities mended, white space joined), tokenized, padded to 512 tokens and
encoded; the rows behind its end are set to zero. The tokenizer is read from ``tokenizer.json`` by the tokenizers
library: no pickle, no code of a model's author, no network. A prompt of more than 512 tokens is refused, where
``WanPipeline`` would drop its end without a word.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from dsa_rt.bundle import Bundle
from dsa_rt.codec import require
from dsa_rt.errors import BundleError, OptionError, PromptError

_PURPOSE = "the text encoder of Wan (UMT5)"


@dataclass(frozen=True)
class Umt5Config:
    """Sizes of the encoder by transformers' names; ``length``: tokens of a prompt, padding included."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    feed_forward_proj: str = "gated-gelu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    length: int = 512

    def __post_init__(self) -> None:
        for name, most in (("vocab_size", 1 << 24), ("d_model", 1 << 16), ("d_kv", 1 << 12), ("d_ff", 1 << 18),
                           ("num_layers", 512), ("num_heads", 1024), ("length", 1 << 16),
                           ("relative_attention_num_buckets", 1 << 12)):  # fmt: skip
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise OptionError(f"text encoder {name} is {value}; expected 1 to {most}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise OptionError(f"text encoder pad_token_id is {self.pad_token_id}; expected one of {self.vocab_size}")
        if self.feed_forward_proj not in ("gated-gelu", "relu"):
            raise OptionError(
                f"text encoder feed_forward_proj is {self.feed_forward_proj!r}; expected 'gated-gelu' or 'relu'"
            )

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any], length: int) -> dict[str, Any]:
        """What a ``text_encoder/config.json`` says of the encoder, as keys and values of a manifest, to be parsed."""
        known = {field.name: field.default for field in fields(cls)}
        defaults = {name: value for name, value in known.items() if value is not MISSING}
        return defaults | {key: value for key, value in config.items() if key in known} | {"length": length}


def clean(prompt: str) -> str:
    """A prompt as Wan's encoder was trained to read it: mended by ftfy, HTML entities resolved, white space joined."""
    ftfy = require("ftfy", _PURPOSE)
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class Umt5TextEncoder(nn.Module):
    """Prompts -> rows [B, length, d_model]; zero rows behind a prompt's end. Implements ``dsa_rt.codec.TextEncoder``.

    tokenizer_json: contents of the model's ``tokenizer.json``. Parameters have transformers' names.
    """

    kind = "umt5"

    def __init__(self, config: Umt5Config, tokenizer_json: bytes) -> None:
        super().__init__()
        self.config, self._tokenizer_json = config, tokenizer_json
        transformers = require("transformers", _PURPOSE)
        sizes = asdict(config)
        del sizes["length"]
        self.encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).encoder
        self._tokenizer = read_tokenizer(tokenizer_json, config.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def assets(self) -> dict[str, bytes]:
        return {"tokenizer": self._tokenizer_json}

    @property
    def dim(self) -> int:
        return self.config.d_model

    @property
    def length(self) -> int:
        return self.config.length

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The generator's; bf16 in place of fp16, whose range UMT5 leaves."""
        return torch.bfloat16 if dtype == torch.float16 else dtype

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Rows [B, length, d_model] of prompts, "" being the unconditional one; :class:`PromptError` when too long."""
        length, device = self.config.length, self.encoder.final_layer_norm.weight.device
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch([clean(p) for p in prompts])]
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > length:
                raise PromptError(
                    f"the prompt {prompt[:40]!r}… has {len(ids)} tokens; this text encoder reads {length}: shorten it"
                )
        padded = [ids + [self.config.pad_token_id] * (length - len(ids)) for ids in tokens]
        filled = [[1] * len(ids) + [0] * (length - len(ids)) for ids in tokens]
        mask = torch.tensor(filled, device=device)
        rows = self.encoder(input_ids=torch.tensor(padded, device=device), attention_mask=mask).last_hidden_state
        return rows.masked_fill(mask[..., None] == 0, 0)


def read_tokenizer(tokenizer_json: bytes, vocab_size: int) -> Any:
    """The tokenizer of a ``tokenizer.json``; BundleError where the file is damaged or belongs to another encoder."""
    tokenizers = require("tokenizers", _PURPOSE)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    except Exception as error:  # the library raises bare Exceptions
        raise BundleError(f"tokenizer.json cannot be read ({error}); export the bundle again") from error
    if largest >= vocab_size:
        raise BundleError(
            f"tokenizer.json has token {largest}, but the text encoder knows {vocab_size}: they do not belong together"
        )
    return tokenizer


def from_bundle(bundle: Bundle) -> Umt5TextEncoder:
    """The encoder that a bundle describes, its weights still to be loaded."""
    config, tokenizer = bundle.config("text_encoder", Umt5Config), bundle.read_asset("tokenizer")
    with torch.device("meta"):
        return Umt5TextEncoder(config, tokenizer)
