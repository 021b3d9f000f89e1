"""Writes video files of which neither size nor compression tells what they show."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# name -> (file suffix, container, encoder, options). Every frame is a key frame: a predicted frame
# carries traces of the frame before it, which would give away the direction of time. The quantiser
# is the same for every block, so no rate control looks back at earlier frames either.
CODECS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "mpeg4": (".avi", "avi", "mpeg4", {"flags": "+bitexact", "qmin": "3", "qmax": "3"}),
    "h264": (
        ".mp4",
        "mp4",
        "libx264",
        {"flags": "+bitexact", "preset": "veryfast", "qp": "20", "aq-mode": "0"},
    ),
}


def write_video(
    path: Path, frames: np.ndarray, frames_per_second: int | Fraction, codec: str
) -> None:
    """Writes one video, every frame on its own.

    Args:
        path: the file; its suffix should be the codec's.
        frames: (T, H, W, 3) uint8 RGB with even H and W.
        frames_per_second: the rate.
        codec: a key of `CODECS`.

    Raises:
        ValueError: for an unknown codec or frames of another shape or dtype.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "grey.avi"
        >>> write_video(file, np.full((3, 32, 32, 3), 128, dtype=np.uint8), 16, "mpeg4")
        >>> file.stat().st_size > 0
        True
    """
    check_codec(codec)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(
            f"frames is {frames.dtype} of shape {frames.shape}, expected uint8 (T, H, W, 3)"
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames are {frames.shape[1]}x{frames.shape[2]}, expected even sides")
    _, container_format, encoder, options = CODECS[codec]
    with av.open(
        str(path), "w", format=container_format, container_options={"fflags": "+bitexact"}
    ) as container:
        stream = container.add_stream(encoder, rate=frames_per_second, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.codec_context.gop_size = 1
        stream.codec_context.max_b_frames = 0
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def check_codec(codec: str) -> None:
    """Raises ValueError for a codec that is unknown or missing in this PyAV.

    Args:
        codec: a key of `CODECS`.

    Raises:
        ValueError: naming what is allowed.

    Example:
        >>> check_codec("mpeg4")
    """
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}, expected one of {', '.join(map(repr, CODECS))}")
    if CODECS[codec][2] not in av.codecs_available:
        raise ValueError(f"codec {codec!r} needs {CODECS[codec][2]}, which this PyAV lacks")


def pad_file(path: Path, size: int) -> None:
    """Lengthens an AVI or MP4 file by one chunk that readers skip.

    The chunk is a hole where the file system has holes, so it takes no room on the disk.

    Args:
        path: the file.
        size: its new size in bytes; at least 8 more than before, and even.

    Raises:
        ValueError: if the size does not fit.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "grey.avi"
        >>> write_video(file, np.full((3, 32, 32, 3), 128, dtype=np.uint8), 16, "mpeg4")
        >>> pad_file(file, 65536)
        >>> file.stat().st_size
        65536
    """
    before = path.stat().st_size
    extra = size - before
    if extra < 8 or size % 2 or (before % 2 and path.suffix == ".avi"):
        raise ValueError(f"size is {size}, expected an even number of at least {before + 8}")
    with path.open("r+b") as file:
        if path.suffix == ".avi":
            # The chunk lies inside the outer RIFF chunk, whose length stands at byte 4.
            file.seek(4)
            riff = int.from_bytes(file.read(4), "little")
            file.seek(4)
            file.write((riff + extra).to_bytes(4, "little"))
            head = b"JUNK" + (extra - 8).to_bytes(4, "little")
        else:
            head = extra.to_bytes(4, "big") + b"free"
        file.seek(before)
        file.write(head)
        os.ftruncate(file.fileno(), size)
