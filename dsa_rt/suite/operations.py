"""How many operations and bytes a run takes at least, from the sizes of the generator and from what it computed.

Counted are matrix products and attention, two operations for a multiplication and its addition, of C = dim, F =
ffn_dim, P and P' = values of an input and an output row, L = text rows. A pass with A active tokens that attend to N
K/V rows, with R rows of timesteps::

    A (2 P C + 2 C P')                                        patch embedding and head
    R (2 freq C + 2 C² + 12 C²)                               timesteps
    layers · A (8 C² + 4 N C)                                 self-attention: q, k, v, o; scores and weighted sum
    layers · A (4 C² + 4 L C)                                 cross-attention: q, o; the same
    layers · A 4 C F                                          feed-forward

Norms, rotations, GELU, the sampler's steps, the confidence head and what is done once a prompt (the K/V of the text)
are left out: together below a few percent, and only ever to the disadvantage of what is reported.

Bytes are the least a pass can move: all weights of blocks, embeddings and head once, the K/V rows it reads and those it
writes, and the text's K/V. What passes between ops inside a block is left out, so that the intensity is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsa_rt.models.config import WanConfig
from dsa_rt.settings import Settings
from dsa_rt.stats import ChunkStats


@dataclass(frozen=True)
class Work:
    """Operations and bytes; they add up."""

    operations: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, count: int) -> Work:
        return Work(self.operations * count, self.bytes * count)


NOTHING = Work(0, 0)


def pass_work(config: WanConfig, active: int, rows: int, timestep_rows: int, itemsize: int) -> Work:
    """One evaluation of the generator: ``active`` tokens that attend to ``rows`` K/V rows, their own among them."""
    dim, ffn, layers, text = config.dim, config.ffn_dim, config.layers, config.text_length
    ends = active * 2 * dim * (config.patch_dim + config.velocity_dim)
    time = timestep_rows * 2 * dim * (config.freq_dim + dim + 6 * dim)
    token = (8 * dim * dim + 4 * rows * dim) + (4 * dim * dim + 4 * text * dim) + 4 * dim * ffn
    weights = dim * (config.patch_dim + config.velocity_dim + config.freq_dim + 7 * dim)
    weights += layers * (6 * dim * dim + 2 * dim * ffn)
    kept = 2 * layers * dim * (rows + active + text)
    return Work(ends + time + layers * active * token, itemsize * (weights + kept))


def run_work(config: WanConfig, settings: Settings, chunks: Sequence[ChunkStats], itemsize: int) -> Work:
    """All passes of a whole clip's chunks, context passes and both branches of guidance included. A context pass that
    ran with the next chunk's first pass counts as one of its own, except for its weights, which are counted twice."""
    total, tokens = NOTHING, settings.grid.tokens
    timestep_rows = settings.chunk_frames if settings.causal else 1

    def one(index: int, active: int) -> Work:
        seen = min((index + 1) * settings.chunk_frames, settings.window) * tokens
        return pass_work(config, active, seen, timestep_rows, itemsize)

    for chunk in chunks:
        for active in chunk.active_tokens:
            total += one(chunk.index, active) * chunk.calls_per_pass
    for index in range(sum(chunk.context_passes for chunk in chunks)):  # whichever chunk they are reported with
        total += one(index, settings.chunk_frames * tokens)
    return total
