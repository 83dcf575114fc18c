"""A layer of Wan 1.3B on a GPU against its floor: the whole layer as the model runs it, and each of its parts.

    python -m bench.gpu.layer --out FOLDER

A layer's time is the difference of a model of six layers and one of two, a quarter of it: embeddings and the head
fall out. The floor of a part is its operations at the rate of a large bf16 product, or its bytes at that of a copy,
whichever takes longer, both measured in this run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import common
from bench.gpu import timing
from dsa_rt.models.config import WanConfig
from dsa_rt.models.sizes import WAN_SIZES
from dsa_rt.models.wan import TextKV, WanModel
from dsa_rt.ops import layers as ops
from dsa_rt.plan import ActiveSet, rope_table

FRAMES = 21
FEW, MANY = 2, 6
WAN = WAN_SIZES["wan2.1-t2v-1.3b"]
CONFIGS = {"wan": WAN, "tiny": replace(WAN, dim=48, ffn_dim=80, heads=2, text_dim=24, text_length=7)}


@dataclass
class OneCache:
    """K and V [layers, 1, N, H, D]: the active rows go to their slots, and all rows are attended."""

    k: Tensor
    v: Tensor

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.k[layer], self.v[layer], active.slots

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor]:
        return self.k[layer], self.v[layer]


@dataclass(frozen=True)
class Part:
    """A part of a layer: what runs, its matrix operations and its bytes."""

    run: Callable[[], object]
    operations: int = 0
    nbytes: int = 0

    def floor(self, best: dict[str, float]) -> float:
        """Microseconds."""
        return max(self.operations / best["matmul_tflop_s"] / 1e6, self.nbytes / best["copy_gb_s"] / 1e3)


def active_set(config: WanConfig, count: int, cached: int, device: torch.device) -> ActiveSet:
    """Tokens spread over all rows of the cache."""
    tokens = torch.arange(count) * cached // count
    cos, sin = (t.to(device) for t in rope_table(torch.stack((tokens // 1560, tokens % 1560 // 52, tokens % 52), -1),
                                                 config.head_dim))  # fmt: skip
    rows = (torch.arange(count) * FRAMES // count).to(device)
    return ActiveSet(tokens.to(device), cos, sin, rows, tokens.to(device), cached)


class Setting:
    """The tensors of a measurement."""

    def __init__(self, config: WanConfig, active: int, cached: int, device: torch.device) -> None:
        self.config, self.device, self.cached = config, device, cached
        self.active = active_set(config, active, cached, device)
        self.rows = torch.randn(1, active, config.patch_dim, device=device).bfloat16()
        self.timesteps = torch.linspace(0, 999, FRAMES, device=device)[None]
        shape = (MANY, 1, cached, config.heads, config.head_dim)
        self.cache = OneCache(*(torch.randn(shape, device=device).bfloat16() for _ in range(2)))
        self.text = torch.randn(1, config.text_length, config.text_dim, device=device).bfloat16()

    def forward(self, layers: int) -> Callable[[], object]:
        """A model of so many layers with random weights, ready to run."""
        with torch.device(self.device):
            model = WanModel(replace(self.config, layers=layers)).bfloat16().eval()
        text: TextKV = model.embed_text(self.text)
        return lambda: model(self.rows, self.active, self.timesteps, text, self.cache)

    def parts(self) -> dict[str, Part]:
        """What a layer consists of; bytes and operations as in the floors."""
        c, a, device = self.config, len(self.active.tokens), self.device
        size, width = 2, c.dim
        x, y = (torch.randn(1, a, width, device=device).bfloat16() for _ in range(2))
        hidden = torch.randn(1, a, c.ffn_dim, device=device).bfloat16()
        with torch.device(device):
            square = [nn.Linear(width, width).bfloat16() for _ in range(6)]
            wide, narrow = nn.Linear(width, c.ffn_dim).bfloat16(), nn.Linear(c.ffn_dim, width).bfloat16()
        tables = [0.1 * torch.randn(1, FRAMES, width, device=device) for _ in range(3)]
        weight = torch.ones(width, device=device)
        k, v = self.cache.k[0], self.cache.v[0]
        text = [torch.randn(1, c.text_length, c.heads, c.head_dim, device=device).bfloat16() for _ in range(2)]
        q = x.unflatten(-1, (c.heads, -1))
        norms = (weight, weight, self.active.cos, self.active.sin, self.active.slots, c.eps)

        def linears() -> None:
            for layer in square:
                layer(x)
            ops.linear(wide, x, activation="gelu")
            narrow(hidden)

        def norm() -> object:
            return ops.residual_norm_modulate(x, y, *tables, self.active.modulation_rows, c.eps, keep=True)

        return {
            "self-attention": Part(lambda: ops.active_attention(q, k, v), 4 * a * self.cached * width),
            "linears": Part(linears, 2 * a * width * (6 * width + 2 * c.ffn_dim)),
            "cross-attention": Part(lambda: ops.active_attention(q, *text), 4 * a * c.text_length * width),
            "qk norm, RoPE, store": Part(
                lambda: ops.qk_norm_rope_store(k, v, x, x, y, *norms), nbytes=6 * a * width * size
            ),
            "cross q norm": Part(lambda: ops.rms_norm(x, weight, c.eps), nbytes=2 * a * width * size),
            "3 residuals, norms, modulations": Part(
                lambda: [norm() for _ in range(3)], nbytes=3 * 4 * a * width * size
            ),
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``gpu-layer.json``."""
    made = argparse.ArgumentParser(prog="python -m bench.gpu.layer", description="A layer against its floor.")
    made.add_argument("--out", type=Path, required=True, help="folder for gpu-layer.json")
    made.add_argument("--device", default="cuda")
    made.add_argument("--sizes", choices=CONFIGS, default="wan")
    made.add_argument("--active", type=common.positive, nargs="*", default=[4680], help="active tokens")
    made.add_argument("--cached", type=common.positive, default=32760, help="rows of the cache")
    made.add_argument("--commit", help="what to write down as the commit, where this is no git checkout")
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    result = timing.fingerprint("gpu.layer", options, options.commit, [
        "a CUDA graph of whole forward passes; a layer: the difference of two depths",
        "floor: operations at the rate of an 8192³ product or bytes at the rate of a 1 GiB copy, measured in this run",
    ])  # fmt: skip
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        best = timing.rates(device, small=options.sizes == "tiny")
        print(f"copy {best['copy_gb_s']:.0f} GB/s, bf16 product {best['matmul_tflop_s']:.0f} TFLOP/s")
        for active in options.active:
            setting = Setting(CONFIGS[options.sizes], active, options.cached, device)
            few, many = (timing.measure([setting.forward(layers)], device) for layers in (FEW, MANY))
            parts = {
                name: timing.measure([part.run], device) | {"floor": part.floor(best)}
                for name, part in setting.parts().items()
            }
            floor = sum(part["floor"] for part in parts.values())
            layer = (many["median"] - few["median"]) / (MANY - FEW)
            rows.append({"active": active, "cached": options.cached, "layer_us": layer, "floor_us": floor,
                         "times_floor": layer / floor, "forward_us": {str(FEW): few, str(MANY): many},
                         "parts": parts})  # fmt: skip
            table = [[name, common.figure(p["median"]), common.figure(p["p20"]), common.figure(p["p80"]),
                      common.figure(p["floor"]), common.figure(p["median"] / p["floor"], 2), p["timed"]]
                     for name, p in parts.items()]  # fmt: skip
            table.append(["whole layer", common.figure(layer), "-", "-", common.figure(floor),
                          common.figure(layer / floor, 2), many["timed"]])  # fmt: skip
            header = [f"A {active} of {options.cached}", "µs", "p20", "p80", "floor µs", "times floor", "timed by"]
            print(common.table(header, table))
            del setting
            if device.type == "cuda":
                torch.cuda.empty_cache()
    result |= {"best": best, "card_after": timing.card(), "rows": rows}
    print("written:", common.show_path(common.write_json(options.out, "gpu-layer.json", result)))
    return 0


if __name__ == "__main__":
    sys.exit(common.run(main))
