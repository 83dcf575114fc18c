"""What of a graphics card matters to the choice of tiles and pieces."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Card(NamedTuple):
    """multiprocessors: how many there are; capability: (9, 0) is Hopper, as in ``sm_90``."""

    multiprocessors: int
    capability: tuple[int, int]


H100 = Card(132, (9, 0))


def card_of(tensor: Tensor) -> Card:
    """The card a tensor is on; for a tensor that is on none (Triton's interpreter, compiling ahead) an H100."""
    return _card(tensor.device.index) if tensor.is_cuda else H100


@lru_cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(properties.multi_processor_count, (properties.major, properties.minor))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)
