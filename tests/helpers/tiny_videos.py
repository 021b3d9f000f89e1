"""Small data sets of real video files for tests of the trainer and the command line."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAMES = 12
SIDE = 32
RATE = 10


def write_video(path: Path, frames: np.ndarray, rate: int = RATE) -> None:
    """Writes (T, H, W, 3) uint8 frames as MPEG-4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_any(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str,
    pix_fmt: str,
    rate: int = 10,
    pts: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """Frames (T, H, W, 3) by any codec, in any pixel format, at any times (milliseconds)."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts = number if pts is None else pts[number]
            if pts is not None:
                frame.time_base = Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_8k(path: Path) -> Path:
    """One frame of 7680 x 4320: the left half black, the right half white."""
    planes = np.full((4320 * 3 // 2, 7680), 128, dtype=np.uint8)
    planes[:4320, :3840], planes[:4320, 3840:] = 0, 255
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 4320, 7680, "yuvj420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuvj420p")))
        output.mux(stream.encode())
    return path


def bar_video(direction: str, seed: int, frames: int = FRAMES) -> np.ndarray:
    """A bright bar that moves "up" or "down" over noise."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 60, (frames, SIDE, SIDE, 3)).astype(np.uint8)
    begin = int(rng.integers(SIDE))
    for number in range(frames):
        step = 2 * number if direction == "down" else -2 * number
        rows = (np.arange(4) + begin + step) % SIDE
        video[number, rows] = rng.integers(200, 256)
    return video


def make_folder(root: Path, classes: tuple[str, ...] = ("down", "up"), videos: int = 10) -> Path:
    """Makes root/CLASS/NN.avi."""
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(videos):
            direction = "up" if name.startswith("up") else "down"
            video = bar_video(direction, 1000 * place + number)
            write_video(root / name / f"{number:02d}.avi", video)
    return root


# Options of `ca3d train` that make a run of a second or two. BatchNorm sees at least 32 values a
# channel: with two it would blow up gradients.
TINY: dict[str, object] = {
    "model": "ca3d_tiny",
    "model_options": {"widths": [4, 4, 8, 8], "dropout": 0.3},
    "frames": 8,
    "stride": 1,
    "size": 32,
    "batch_size": 5,
    "epochs": 2,
    "workers": 0,
    "schedule": "constant",
    "lr": 0.01,
}


def flags(options: dict[str, object]) -> list[str]:
    """The same options as a command line."""
    words = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, dict):
            words += [f"{flag}.{name}={item}" for name, item in value.items()]
        elif value is True:
            words.append(flag)
        else:
            words.append(f"{flag}={value}")
    return words
