"""The image that image-to-video begins with, as a user has it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dsa_rt.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    ImageLike: TypeAlias = Image | NDArray[np.uint8] | Tensor | str | os.PathLike[str]

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def read_image(image: ImageLike, height: int, width: int) -> Tensor:
    """Pixels [height, width, 3] uint8 in host memory.

    image: a PIL image, a file's path, or an array or tensor [height, width, 3] uint8. Pictures are turned upright as
    their EXIF data say; grey and palette pictures, and alpha that is opaque everywhere, become RGB, which loses
    nothing. Refused, not guessed: transparency and more than 8 bits a channel (:class:`OptionError`), another size or
    another kind of array (:class:`ShapeError`).
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(os.fspath(image), height, width)
    if isinstance(image, np.ndarray | Tensor):
        pixels = torch.from_numpy(image.copy()) if isinstance(image, np.ndarray) and image.dtype == np.uint8 else image
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ShapeError(
                f"the image is {list(image.shape)} {image.dtype}; expected [{height}, {width}, 3] uint8: red, green "
                "and blue from 0 to 255, which (255 * x).round() makes of values in [0, 1]"
            )
        _check_size(pixels.shape[1], pixels.shape[0], height, width)
        return pixels.detach().cpu().contiguous()
    from PIL import Image

    if isinstance(image, Image.Image):
        return _from_pil(image, "the image", height, width)
    raise OptionError(
        f"image is of type {type(image).__name__}; expected a PIL image, a file's path, or a numpy array or torch "
        f"tensor [{height}, {width}, 3] uint8"
    )


def _from_file(path: str, height: int, width: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return _from_pil(picture, f"image {path!r}", height, width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL has it
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"image {path!r} cannot be read ({error}); name a PNG, JPEG or WebP file") from error


def _from_pil(picture: Image, name: str, height: int, width: int) -> Tensor:
    from PIL import ImageOps

    if picture.mode not in _MODES:
        raise OptionError(f"{name} has mode {picture.mode}; save it as RGB with 8 bits a channel first")
    upright = ImageOps.exif_transpose(picture)
    _check_size(*upright.size, height, width, name)
    if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        if upright.getchannel("A").getextrema() != (255, 255):
            raise OptionError(
                f"{name} has transparent pixels; put it on a background first, in PIL with background.paste(image, "
                "mask=image)"
            )
    return torch.from_numpy(np.array(upright.convert("RGB")))


def _check_size(wide: int, high: int, height: int, width: int, name: str = "the image") -> None:
    if (wide, high) != (width, height):
        raise ShapeError(
            f"{name} is {wide}x{high} pixels (width x height), but this run makes {width}x{height}: resize or crop it "
            f"first, with PIL.ImageOps.fit(image, ({width}, {height})) for example, or ask for another height and width"
        )
