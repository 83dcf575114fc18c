"""Video: frames, latents and statistics of one generation, and every way to get them out.

| to            | how                                              |
|---------------|--------------------------------------------------|
| MP4           | `video.save("clip.mp4")`, :class:`Mp4Writer` while streaming |
| GIF           | `video.save("clip.gif")`                         |
| PNG frames    | `video.save("folder")`, `video.save("frame-%04d.png")`; `"name.png"` holds one frame |
| NumPy files   | `video.save("clip.npy")` (frames), `"clip.npz"` (frames, latents, fps, stats as JSON) |
| arrays        | `video.numpy()`, `.torch()`, `.cupy()`, or any `from_dlpack(video)` |

Every file is written whole or not at all (:mod:`dsa_rt.output`).
"""

from __future__ import annotations

import itertools
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa_rt.errors import OptionError, OutputError, ShapeError
from dsa_rt.output import check_output, is_folder, is_pattern, whole_file, whole_frames

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from dsa_rt.stats import Stats

    Array = np.ndarray[Any, Any]

__all__ = ["Mp4Writer", "Video", "check_output"]


@dataclass(eq=False)
class Video:
    """What one generation made.

    frames: uint8 [T, H, W, 3], RGB, on the device it was made on.
    latents: the codec's normalised latents as they left the sampler, or None.
    fps: frames per second of playback.  stats: what was spent, or None.
    """

    frames: Tensor
    latents: Tensor | None = None
    fps: float = 16.0
    stats: Stats | None = None

    def __post_init__(self) -> None:
        _check_frames(self.frames)

    def __len__(self) -> int:
        return int(self.frames.shape[0])

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({count} frames of {height}x{width}, {self.seconds:.2f} s at {self.fps:g} fps)"

    @property
    def seconds(self) -> float:
        """Duration of playback."""
        return len(self) / self.fps

    def numpy(self) -> Array:
        """Frames as a NumPy array [T, H, W, 3]; shares memory when they are on the CPU."""
        return self.frames.cpu().numpy()

    def torch(self) -> Tensor:
        """Frames as they are, without a copy."""
        return self.frames

    def cupy(self) -> Any:
        """Frames as a CuPy array: shared memory if they are on a CUDA device, otherwise a copy.

        Raises OptionError when CuPy is not installed.
        """
        try:
            import cupy
        except ImportError as error:
            raise OptionError(
                "CuPy is not installed: install the package for your CUDA version "
                "(cupy-cuda12x or cupy-cuda13x), or use .numpy() or .torch()"
            ) from error
        return cupy.from_dlpack(self.frames) if self.frames.is_cuda else cupy.asarray(self.numpy())

    def __dlpack__(self, **options: Any) -> Any:
        return self.frames.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.frames.__dlpack_device__()

    def thumbnails(self, count: int = 3, span: range | None = None) -> Array:
        """`count` frames [count, H, W, 3] from the middles of equal parts of the video or a span."""
        span = range(len(self)) if span is None else span
        picks = [span[int((part + 0.5) * len(span) / count)] for part in range(count)] if len(span) else []
        return self.frames[picks].cpu().numpy()

    def save(self, path: str | os.PathLike[str], scale: int = 1) -> Path:
        """Writes the video in the format its name asks for (see the module's table) and returns the path.

        scale: whole-number enlargement of MP4, GIF and PNG by repeating pixels, so that small videos stay
            crisp in players that would blur them.
        Raises OutputError when the name, the folder or the disk does not allow it; OptionError for a bad
        scale.
        """
        target = check_output(path, frames=len(self))
        if not isinstance(scale, int) or scale < 1:
            raise OptionError(f"scale is {scale!r}; expected a whole number from 1")
        suffix = target.suffix.lower()
        if is_pattern(target) or is_folder(target) or suffix == ".png":
            self._save_png(target, scale)
        elif suffix == ".mp4":
            with Mp4Writer(target, self.fps, scale) as writer:
                writer.write(self.frames)
        elif suffix == ".gif":
            self._save_gif(target, scale)
        else:
            if scale != 1:
                raise OptionError(
                    f"scale is {scale}, but {suffix} holds the frames as they are: leave it at 1"
                )
            self._save_arrays(target, suffix)
        return target

    def _save_png(self, target: Path, scale: int) -> None:
        from PIL import Image

        frames = _enlarged(self.numpy(), scale)
        if not is_pattern(target) and not is_folder(target):
            with whole_file(target) as file:
                Image.fromarray(frames[0]).save(file)
            return
        with whole_frames(target) as folder:
            for number, frame in enumerate(frames):
                Image.fromarray(frame).save(folder / f"{number:04d}.png")

    def _save_gif(self, target: Path, scale: int) -> None:
        from PIL import Image

        frames = self.numpy()
        palette = _shared_palette(frames)
        pictures = [
            Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
            for frame in _enlarged(frames, scale)
        ]
        with whole_file(target) as file:
            pictures[0].save(
                file,
                save_all=True,
                append_images=pictures[1:],
                duration=gif_durations(len(frames), self.fps),
                loop=0,
                optimize=False,
                disposal=1,
            )

    def _save_arrays(self, target: Path, suffix: str) -> None:
        import numpy

        with whole_file(target) as file:
            if suffix == ".npy":
                numpy.save(file, self.numpy(), allow_pickle=False)
                return
            arrays: dict[str, Any] = {"frames": self.numpy(), "fps": numpy.float64(self.fps)}
            if self.latents is not None:
                arrays["latents"] = self.latents.float().cpu().numpy()
            if self.stats is not None:
                arrays["stats"] = numpy.array(json.dumps(self.stats.to_dict(), allow_nan=False))
            numpy.savez(file, **arrays)


class Mp4Writer:
    """Encodes frames as they come; the file appears when the block ends without an error.

        with Mp4Writer("clip.mp4", fps=16, scale=4) as writer:
            for chunk in generate.stream(prompt):
                writer.write(chunk.frames)

    H.264 (libx264) where PyAV has it, MPEG-4 part 2 otherwise; yuv420p in BT.709 limited range, which
    every player reads. yuv420p needs even sizes: an odd width or height gets one repeated row or column.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 16.0, scale: int = 1) -> None:
        self._target = check_output(path, {".mp4": "av"})
        self._rate = Fraction(fps).limit_denominator(1001)
        self._scale = scale
        self._open = ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> Mp4Writer:
        import av

        with ExitStack() as stack:
            file = stack.enter_context(whole_file(self._target))
            self._container = av.open(str(file), "w", options={"movflags": "+faststart"})
            stack.push(self._finish)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> bool | None:
        return self._open.__exit__(kind, value, trace)  # _finish, then the file gets its name or is removed

    def write(self, frames: Tensor | Array) -> None:
        """Appends uint8 frames [t, H, W, 3], all of one size; call it inside the `with` block."""
        import av
        import numpy
        from av.video.reformatter import ColorRange, Colorspace

        _check_frames(frames)
        if self._container is None:
            raise OutputError(f"'{self._target}' is not open: use Mp4Writer in a with block")
        pixels = _enlarged(frames if isinstance(frames, numpy.ndarray) else frames.cpu().numpy(), self._scale)
        height, width = pixels.shape[1:3]
        pixels = numpy.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._open_stream(*pixels.shape[1:3])
            self._shape = pixels.shape[1:]
        elif pixels.shape[1:] != self._shape:
            raise ShapeError(
                f"frames of {height}x{width} after frames of {self._shape[0]}x{self._shape[1]} in one MP4"
            )
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(numpy.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            self._mux(self._container, frame)

    def _finish(self, kind: Any, value: Any, trace: Any) -> None:
        container, self._container = self._container, None
        if kind is not None:
            with suppress(Exception):  # the file goes anyway, and the first error is the one to report
                container.close()
            return
        if self._stream is None:
            raise OutputError(f"no frames were written to '{self._target}'")
        try:
            self._mux(container, None)
        finally:
            container.close()

    def _open_stream(self, height: int, width: int) -> None:
        from av import codecs_available

        if "libx264" in codecs_available:
            stream = self._container.add_stream(
                "libx264", rate=self._rate, options={"crf": "15", "preset": "medium"}
            )
        else:
            stream = self._container.add_stream("mpeg4", rate=self._rate, options={"qscale": "2"})
            stream.bit_rate = 8 * height * width * int(self._rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        self._stream = stream

    def _mux(self, container: Any, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            container.mux(packet)


def gif_durations(count: int, fps: float) -> list[int]:
    """Milliseconds each of `count` GIF frames is shown.

    GIF counts in 10 ms and players slow down below 20 ms. The rounding error is carried along, so that 16 fps
    becomes 60, 60, 70, 60, … and stays in time.
    """
    edges = [round(100 * number / fps) for number in range(count + 1)]
    return [10 * max(2, after - before) for before, after in itertools.pairwise(edges)]


def _shared_palette(frames: Array) -> Image.Image:
    """One palette for all frames, from at most 16 of them: colours that rest do not flicker."""
    import numpy
    from PIL import Image

    picks = frames[numpy.unique(numpy.linspace(0, len(frames) - 1, 16).round().astype(int))]
    montage = Image.fromarray(picks.reshape(-1, *picks.shape[2:]))
    return montage.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def _enlarged(frames: Array, scale: int) -> Array:
    return frames if scale == 1 else frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _check_frames(frames: Any) -> None:
    shape, dtype = tuple(frames.shape), str(frames.dtype).removeprefix("torch.")
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape or dtype != "uint8":
        raise ShapeError(f"frames are {dtype} {list(shape)}; expected uint8 [T, H, W, 3] with T, H, W from 1")
