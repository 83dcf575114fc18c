"""Small checkpoints in every published form, made with the libraries that published the large ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from tiny import randomise
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from dsa_rt.convert.names import wan_name

TEXT_DIM, CHANNELS = 20, 4
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "bouncing", "on", "grass", "blue", "cat", "&", "and", "—", "'"]


def transformer(
    seed: int = 0, heads: int = 2, head_dim: int = 24, layers: int = 2, **sizes: Any
) -> WanTransformer3DModel:
    """diffusers' transformer with random weights, fp32."""
    channels = sizes.pop("in_channels", CHANNELS)
    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=channels, num_layers=layers, ffn_dim=56,
        text_dim=TEXT_DIM, freq_dim=32, **({"out_channels": CHANNELS} | sizes),
    )  # fmt: skip
    randomise(model, seed)
    return model.eval()


def video_codec(seed: int = 1, ti2v: bool = False) -> AutoencoderKLWan:
    """Wan 2.1's VAE, or Wan 2.2 TI2V's, with few channels and random weights."""
    generator = torch.Generator().manual_seed(seed)
    z = 6 if ti2v else CHANNELS
    sizes: dict[str, Any] = {"base_dim": 8, "z_dim": z, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
                             "latents_mean": torch.randn(z, generator=generator).tolist(),
                             "latents_std": (0.5 + torch.rand(z, generator=generator)).tolist()}  # fmt: skip
    if ti2v:
        sizes |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                  "scale_factor_spatial": 16, "decoder_base_dim": 16}  # fmt: skip
    model = AutoencoderKLWan(**sizes)
    scramble(model, seed)
    return model.eval()


def scramble(model: nn.Module, seed: int) -> None:
    """Random weights of fitting size everywhere, the gains of norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * 1.4 * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise)


def text_encoder(seed: int = 2) -> UMT5EncoderModel:
    model = UMT5EncoderModel(
        UMT5Config(vocab_size=40, d_model=TEXT_DIM, d_kv=6, d_ff=24, num_layers=2, num_heads=3)
    )
    scramble(model, seed)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of WORDS; a "</s>" at the end, as UMT5's has."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def image_encoder(seed: int = 3, layers: int = 3) -> CLIPVisionModel:
    model = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=2,
                         image_size=28, patch_size=7, hidden_act="gelu")
    )  # fmt: skip
    scramble(model, seed)
    return model.eval()


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def pipeline(kind: str = "t2v", dtype: torch.dtype = torch.float32) -> WanPipeline | WanImageToVideoPipeline:
    """A whole pipeline: "t2v", "i2v" (Wan 2.1), "t2v-a14b", "i2v-a14b" (Wan 2.2, two experts), "ti2v"."""
    ti2v, image = kind == "ti2v", kind.startswith("i2v")
    sizes: dict[str, Any] = {"in_channels": 2 * CHANNELS + 4} if image else {}
    if kind == "i2v":
        sizes |= {"image_dim": 24, "added_kv_proj_dim": 48}
    if ti2v:
        sizes = {"in_channels": 6, "out_channels": 6}
    two = kind.endswith("a14b")
    parts: dict[str, Any] = {
        "transformer": transformer(**sizes), "transformer_2": transformer(9, **sizes) if two else None,
        "vae": video_codec(ti2v=ti2v), "text_encoder": text_encoder(), "tokenizer": tokenizer(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ) if kind != "t2v-a14b" else FlowMatchEulerDiscreteScheduler(shift=12.0),
        "boundary_ratio": 0.875 if two else None, "expand_timesteps": ti2v,
    }  # fmt: skip
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        if parts[name] is not None:
            parts[name].to(dtype)
    if not image:
        return WanPipeline(**parts)
    if kind == "i2v":
        parts |= {"image_encoder": image_encoder(), "image_processor": image_processor()}
    return WanImageToVideoPipeline(**parts)


def original_state(model: WanTransformer3DModel) -> dict[str, Tensor]:
    """The transformer's tensors by the original names, the patch embedding still a convolution."""
    return {wan_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}


def original_config(model: WanTransformer3DModel, kind: str) -> dict[str, Any]:
    """config.json as the original repositories have it."""
    sizes = model.config
    dim = sizes.num_attention_heads * sizes.attention_head_dim
    return {
        "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": dim, "eps": 1e-06, "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim, "in_dim": sizes.in_channels, "model_type": kind,
        "num_heads": sizes.num_attention_heads, "num_layers": sizes.num_layers, "out_dim": sizes.out_channels,
        "text_len": 512,
    }  # fmt: skip


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


