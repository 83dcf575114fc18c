"""Files decoded back and compared with the frames that went in; nothing half-written, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_rt.errors import OptionError, OutputError, ShapeError
from dsa_rt.media import Mp4Writer, Video, check_output, gif_durations
from dsa_rt.output import RECORD_FORMATS, whole_file, whole_frames
from dsa_rt.stats import ChunkStats, Stats


def moving_disc(frames: int = 21, height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    """A saturated disc on grey, smooth enough for a video codec; the colour depends on the seed."""
    colour = np.random.default_rng(seed).integers(0, 256, 3)
    rows, columns = np.mgrid[:height, :width]
    made = np.full((frames, height, width, 3), 120.0)
    for number in range(frames):
        distance = np.hypot(rows - height / 2, columns - 12 - 1.5 * number)
        cover = np.clip(10 - distance, 0, 1)[..., None]
        made[number] = made[number] * (1 - cover) + colour * cover
    return torch.from_numpy(made.round().astype(np.uint8))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def decode(path: Path) -> tuple[np.ndarray, Fraction, str]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context.pix_fmt


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2)))


def leftovers(folder: Path, *expected: str) -> list[str]:
    """Names in the folder that should not be there, hidden ones included."""
    return sorted(set(os.listdir(folder)) - set(expected))


@pytest.mark.parametrize("seed", [0, 1])
def test_mp4_shows_the_frames(tmp_path: Path, seed: int) -> None:
    frames = moving_disc(seed=seed)
    path = Video(frames, fps=16).save(tmp_path / "clip.mp4", scale=3)
    shown, rate, pixel_format = decode(path)
    assert shown.shape == (21, 144, 192, 3) and rate == 16 and pixel_format == "yuv420p"
    expected = frames.numpy().repeat(3, 1).repeat(3, 2)
    assert psnr(shown, expected) > 38
    assert min(psnr(shown[t], expected[t]) for t in range(21)) > 34
    assert (
        psnr(shown[1:], expected[:-1]) < psnr(shown[1:], expected[1:]) - 5
    )  # the right frames in the right order
    assert (
        np.abs(shown[:, :6, :6].mean((0, 1, 2)) - 120).max() < 2
    )  # grey stays grey: range and matrix are right
    assert leftovers(tmp_path, "clip.mp4") == []


def test_mp4_with_odd_sizes_and_a_broken_rate(tmp_path: Path) -> None:
    frames = moving_disc(5, 31, 45)
    shown, rate, _ = decode(Video(frames, fps=30000 / 1001).save(tmp_path / "clip.mp4"))
    assert shown.shape == (5, 32, 46, 3) and rate == Fraction(30000, 1001)
    assert psnr(shown[:, :31, :45], frames.numpy()) > 28


def test_mp4_without_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    frames = moving_disc()
    path = Video(frames).save(tmp_path / "clip.mp4", scale=2)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    shown, rate, _ = decode(path)
    assert shown.shape == (21, 96, 128, 3) and rate == 16
    assert psnr(shown, frames.numpy().repeat(2, 1).repeat(2, 2)) > 34


def test_mp4_can_be_written_while_streaming(tmp_path: Path) -> None:
    frames = moving_disc(12)
    with Mp4Writer(tmp_path / "stream.mp4", fps=16) as writer:
        for piece in (frames[:1], frames[1:8], frames[8:]):
            writer.write(piece)
            assert not (tmp_path / "stream.mp4").exists()
        with pytest.raises(ShapeError, match="10x10"):
            writer.write(noise(1, 10, 10, 3))
    Video(frames).save(tmp_path / "whole.mp4")
    assert np.array_equal(decode(tmp_path / "stream.mp4")[0], decode(tmp_path / "whole.mp4")[0])


def test_gif_shows_the_frames_in_time(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = moving_disc(20)
    frames[7:12] = frames[7]  # at rest for a while: a GIF may merge these
    path = Video(frames, fps=16).save(tmp_path / "clip.gif", scale=2)
    timeline: list[np.ndarray] = []
    total = 0
    with image.open(path) as gif:
        assert gif.info["loop"] == 0
        for number in range(gif.n_frames):
            gif.seek(number)
            start, total = total, total + gif.info["duration"]
            shown = np.asarray(gif.convert("RGB"))
            timeline += [shown] * (round(total * 16 / 1000) - round(start * 16 / 1000))
    assert total == 1250 and len(timeline) == 20  # 20 frames at 16 fps
    for shown, frame in zip(timeline, frames.numpy(), strict=True):
        assert psnr(shown, frame.repeat(2, 0).repeat(2, 1)) > 38


def test_gif_with_few_colours_is_exact(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    palette = noise(40, 3, seed=5)
    frames = palette[torch.randint(0, 40, (6, 16, 20))]
    with image.open(Video(frames).save(tmp_path / "clip.gif")) as gif:
        for number in range(6):
            gif.seek(number)
            assert np.array_equal(np.asarray(gif.convert("RGB")), frames[number].numpy())


@pytest.mark.parametrize("fps", [8, 12.5, 16, 24, 30, 50])
def test_gif_durations_keep_time(fps: float) -> None:
    edges = np.cumsum(gif_durations(200, fps))
    assert np.abs(edges - 1000 * np.arange(1, 201) / fps).max() <= 5 + 1e-9
    assert set(gif_durations(16, 16)) == {60, 70}


def test_png_frames_in_a_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "frames"
    Video(noise(7, 10, 12, 3)).save(folder)
    second = noise(3, 10, 12, 3, seed=1)
    Video(second).save(folder, scale=2)  # an earlier run's frames are replaced as a whole
    assert sorted(os.listdir(folder)) == ["0000.png", "0001.png", "0002.png"]
    for number in range(3):
        shown = np.asarray(image.open(folder / f"{number:04d}.png"))
        assert np.array_equal(shown, second[number].numpy().repeat(2, 0).repeat(2, 1))
    assert leftovers(tmp_path, "frames") == []


def test_png_frames_by_pattern_and_a_single_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = noise(11, 9, 8, 3)
    (tmp_path / "keep.txt").write_text("mine")
    Video(frames).save(tmp_path / "f-%d.png")
    for number in range(11):
        assert np.array_equal(np.asarray(image.open(tmp_path / f"f-{number}.png")), frames[number].numpy())
    Video(frames[:1]).save(tmp_path / "one.png")
    assert np.array_equal(np.asarray(image.open(tmp_path / "one.png")), frames[0].numpy())
    with pytest.raises(OutputError, match=r"11 frames.*two-%04d.png"):
        Video(frames).save(tmp_path / "two.png")
    assert leftovers(tmp_path, "keep.txt", "one.png", *(f"f-{n}.png" for n in range(11))) == []


def test_arrays_come_back_exactly(tmp_path: Path) -> None:
    frames, latents = noise(5, 8, 8, 3), torch.randn(1, 8, 2, 1, 1).bfloat16()
    chunk = ChunkStats(index=0, passes=2, passes_scheduled=4, frames=5)
    stats = Stats(chunks=(chunk,), prompt="a red square", seed=3, policy="dsa")
    video = Video(frames, latents, 16, stats)
    video.save(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), frames.numpy())
    video.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as stored:
        assert np.array_equal(stored["frames"], frames.numpy()) and stored["fps"] == 16
        assert torch.equal(torch.from_numpy(stored["latents"]).bfloat16(), latents)
        assert Stats.from_dict(json.loads(str(stored["stats"]))) == stats


def test_arrays_share_memory() -> None:
    frames = noise(5, 8, 8, 3)
    video = Video(frames)
    assert video.torch() is frames
    assert torch.from_dlpack(video).data_ptr() == frames.data_ptr()
    assert np.from_dlpack(video).ctypes.data == video.numpy().ctypes.data == frames.data_ptr()
    assert (len(video), video.seconds) == (5, 5 / 16)


def test_cupy_is_used_or_refused_with_a_reason() -> None:
    frames = noise(2, 4, 4, 3)
    try:
        import cupy
    except ImportError:
        with pytest.raises(OptionError, match="CuPy is not installed"):
            Video(frames).cupy()
    else:
        assert np.array_equal(cupy.asnumpy(Video(frames).cupy()), frames.numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_frames_on_a_gpu_are_written_and_shared(tmp_path: Path) -> None:
    frames = noise(5, 8, 8, 3).cuda()
    video = Video(frames)
    assert torch.from_dlpack(video).data_ptr() == frames.data_ptr()
    assert np.array_equal(np.load(video.save(tmp_path / "a.npy")), frames.cpu().numpy())
    assert decode(video.save(tmp_path / "a.mp4"))[0].shape == (5, 8, 8, 3)


def test_thumbnails_are_frames_from_the_middles_of_equal_parts() -> None:
    frames = noise(21, 4, 4, 3)
    assert np.array_equal(Video(frames).thumbnails(3), frames[[3, 10, 17]].numpy())
    assert np.array_equal(Video(frames).thumbnails(2, range(9, 21)), frames[[12, 18]].numpy())


@pytest.mark.parametrize(
    "shape, dtype", [((3, 4, 4), torch.uint8), ((3, 4, 4, 3), torch.float32), ((0, 4, 4, 3), torch.uint8)]
)
def test_frames_of_another_kind_are_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match=r"expected uint8 \[T, H, W, 3\]"):
        Video(torch.zeros(shape, dtype=dtype))


# Bad places to write to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, says",
    [
        ("clip.avi", r"clip\.avi.*\.mp4.*\.gif"),
        ("missing/clip.mp4", "no folder.*missing.*create it first"),
        ("file.txt/clip.mp4", "no folder"),
        ("folder.mp4", "not a frame"),
        ("strangers", "holds 'notes.txt'"),
        ("file", "not a folder"),
        ("f-%s.png", "not a pattern"),
        ("f-%d-%d.png", "not a pattern"),
        ("f-%04d.gif", "not a pattern"),
        ("fifo.mp4", "not an ordinary file"),
        ("x" * 300 + ".mp4", "cannot write"),
    ],
)
def test_unusable_paths_are_refused_before_anything_is_written(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder in ("folder.mp4", "strangers"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "fifo.mp4")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=says) as caught:
        check_output(tmp_path / name)
    assert name[:200] in str(caught.value)
    with pytest.raises(OutputError, match=says):
        Video(noise(2, 4, 4, 3)).save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_check_output_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.mp4").write_text("old")
    for name in ("old.mp4", "new.mp4", "CLIP.MP4", "frames", "f-%04d.png", "a.npz"):
        check_output(tmp_path / name)
    assert leftovers(tmp_path, "old.mp4") == [] and (tmp_path / "old.mp4").read_text() == "old"
    with pytest.raises(OutputError, match=r"end in \.json$"):
        check_output(tmp_path / "stats.mp4", RECORD_FORMATS)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_write_protection_is_seen_before_the_work() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, me = Path(name), os.geteuid()
        (folder / "old.mp4").write_text("old")
        (folder / "old.mp4").chmod(0o444)
        folder.chmod(0o555)
        try:
            if me == 0:
                os.seteuid(65534)  # root may write anywhere: look at it as nobody
            with pytest.raises(OutputError, match="write-protected"):
                check_output(folder / "old.mp4")
            with pytest.raises(OutputError, match="Permission denied"):
                check_output(folder / "new.mp4")
        finally:
            os.seteuid(me)
            folder.chmod(0o755)


@pytest.mark.parametrize("scale", [0, -1, 1.5])
def test_bad_scales_are_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(OptionError, match="whole number"):
        Video(noise(1, 4, 4, 3)).save(tmp_path / "a.mp4", scale=scale)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="leave it at 1"):
        Video(noise(1, 4, 4, 3)).save(tmp_path / "a.npy", scale=2)
    assert leftovers(tmp_path) == []


# Nothing half-written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_file_leaves_the_old_one(
    tmp_path: Path, error: type[BaseException], exists: bool
) -> None:
    target = tmp_path / "a.bin"
    if exists:
        target.write_text("old")
    with pytest.raises(error), whole_file(target) as file:
        file.write_text("half")
        raise error
    assert leftovers(tmp_path, *["a.bin"] * exists) == []
    assert not exists or target.read_text() == "old"
    with whole_file(target) as file:
        file.write_text("new")
        assert not exists or target.read_text() == "old"
    assert target.read_text() == "new" and leftovers(tmp_path, "a.bin") == []


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("name", ["frames", "f-%04d.png"])
def test_interrupted_frames_leave_the_old_ones(tmp_path: Path, name: str, exists: bool) -> None:
    pytest.importorskip("PIL.Image")
    old = noise(4, 6, 6, 3)
    if exists:
        Video(old).save(tmp_path / name)
    before = {item: item.read_bytes() for item in tmp_path.rglob("*.png")}
    with pytest.raises(KeyboardInterrupt), whole_frames(tmp_path / name) as folder:
        (folder / "0000.png").write_text("half")
        raise KeyboardInterrupt
    assert {item: item.read_bytes() for item in tmp_path.rglob("*.png")} == before
    assert [item for item in os.listdir(tmp_path) if item.startswith(".")] == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_mp4_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_text("old")
    with pytest.raises(error), Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.write(moving_disc(3))
        raise error
    with pytest.raises(OutputError, match="no frames"), Mp4Writer(tmp_path / "a.mp4"):
        pass
    assert leftovers(tmp_path, "a.mp4") == [] and (tmp_path / "a.mp4").read_text() == "old"


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "a.npz", "frames", "f-%04d.png"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, name: str) -> None:
    """The file size limit of a process stands in for the full disk: writes fail in the middle."""
    code = f"""
import resource, signal, torch
from dsa_rt.media import Video
from dsa_rt.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import av, PIL.Image, numpy
video = Video(torch.randint(0, 256, (20, 64, 64, 3), dtype=torch.uint8), torch.zeros(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    video.save({str(tmp_path / name)!r})
except OutputError as error:
    print("refused", error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.startswith("refused cannot write"), ran.stderr
    assert leftovers(tmp_path) == []


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        Video(noise(2, 4, 4, 3)).save(tmp_path / "a.npy")
    finally:
        os.umask(mask)
    assert (tmp_path / "a.npy").stat().st_mode & 0o777 == 0o644
