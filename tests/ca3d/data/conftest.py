"""Tiny video files whose frames carry their own number."""

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torch import Tensor

WIDTH, HEIGHT, BITS = 64, 48, 8

WriteVideo = Callable[..., Path]


def numbered_image(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """An RGB image with the number as a code of dark and bright columns, bright at the top left."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[:, left:right] = 220 if number >> bit & 1 else 30
    return image


def _write(
    path: Path,
    frames: int | Sequence[np.ndarray] = 40,
    *,
    codec: str = "mpeg4",
    rate: int | Fraction = 25,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: tuple[int, bool] | None = None,
) -> Path:
    images = [numbered_image(i) for i in range(frames)] if isinstance(frames, int) else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = images[0].shape[:2] if images else (HEIGHT, WIDTH)
        stream.pix_fmt = pix_fmt
        if time_base is not None:
            stream.codec_context.time_base = time_base
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i if pts is None else pts[i]
            if time_base is not None:
                frame.time_base = time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    if rotation is not None:
        _turn(path, *rotation)
    return path


def _turn(path: Path, degrees: int, mirror: bool) -> None:
    """Writes a rotation (counter-clockwise) and a mirror after it into an mp4's track header."""
    angle = math.radians(degrees)
    cos, sin, side = round(math.cos(angle)), round(math.sin(angle)), -1 if mirror else 1
    one = 1 << 16
    matrix = (side * cos * one, -sin * one, 0, side * sin * one, cos * one, 0, 0, 0, 1 << 30)
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *matrix)
    path.write_bytes(data)


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    return _write


@pytest.fixture(scope="session")
def write_audio() -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        with av.open(str(path), "w") as output:
            stream: Any = output.add_stream("aac", rate=16000)
            sound = np.zeros((1, 1024), dtype=np.float32)
            for _ in range(8):
                frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
                frame.rate = 16000
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def numbers() -> Callable[[Tensor], list[int]]:
    """Reads the number of each frame of a (T, 3, H, W) clip back."""

    def read(frames: Tensor) -> list[int]:
        bright = frames.float().mean(dim=(1, 2)) > 125
        columns = [(2 * bit + 1) * frames.shape[-1] // (2 * BITS) for bit in range(BITS)]
        return [sum(int(row[c]) << bit for bit, c in enumerate(columns)) for row in bright]

    return read


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six short videos in class folders, without splits; do not change it."""
    root = tmp_path_factory.mktemp("dataset")
    for label in ("jump", "walk"):
        for person in range(3):
            for take in range(2):
                _write(root / label / f"p{person}_t{take}.avi", 24 + 4 * person)
    return root
