"""Reading frames of a video file by index or by time.

`open_video` is the way in. It opens regular files of known video containers and nothing else: a
playlist or a script that calls itself `.avi` cannot make it open another file or the network.
"""

import importlib.util
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ca3d.errors import UserError

VIDEO_SUFFIXES = (
    *(".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".asf"),
    *(".3gp", ".ogv", ".ts", ".mts", ".m2ts", ".vob", ".divx", ".gif"),
)
DECODERS = ("auto", "av", "torchcodec")
INSTALL_AV = 'pip install "ca3d-kernels[app]"'

# A frame that begins less than this many seconds after the asked time counts as shown: containers
# round their timestamps, Matroska to a whole millisecond.
_CLOCK_ROUNDING = 1e-3


class VideoError(UserError):
    """A video file that cannot be read; the message names the file and the remedy.

    Example:
        >>> open_video("missing.mp4")
        Traceback (most recent call last):
        ca3d.data.reader.VideoError: missing.mp4: no such file
    """


class VideoReader(ABC):
    """An open video file: frames by index or by time, as uint8 (T, 3, H, W) RGB.

    Time 0 is the first frame. Frames are upright: the rotation and the flips that a camera wrote
    into the file are applied. Pixels are taken as square.

    Attributes:
        path: The file.
        frames_per_second: Mean frame rate.
        num_frames: Number of frames. Some files hold a few less than they declare: reading beyond
            the last one repeats it.
        duration: Seconds from the first frame's beginning to the last frame's end.
        width: Pixels of an upright frame.
        height: Pixels of an upright frame.
    """

    path: Path
    frames_per_second: float
    num_frames: int
    duration: float
    width: int
    height: int

    @abstractmethod
    def times(self) -> np.ndarray:
        """Returns the begin of every frame in seconds, float64 (num_frames,), increasing."""

    @abstractmethod
    def _decode(self, indices: list[int], short_side: int | None) -> Mapping[int, np.ndarray]:
        """Decodes frames.

        Args:
            indices: Increasing, without repetition, all below `num_frames`.
            short_side: As in `frames`.

        Returns:
            One (H, W, 3) uint8 image per index; a frame that the file turns out not to hold is the
            nearest earlier one.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes the file; a closed reader reads no more frames."""

    def frames(self, indices: Iterable[int], short_side: int | None = None) -> Tensor:
        """Reads frames by index.

        Args:
            indices: Frame numbers from 0, in any order, with repetition; beyond the last frame the
                last frame is repeated.
            short_side: Pixels of the shorter side after resizing (the other side follows,
                rounded down), or None for the size in the file.

        Returns:
            uint8 (T, 3, H, W), RGB.

        Raises:
            TypeError: An index is not an integer.
            ValueError: An index is negative, or short_side is below 1.
            VideoError: No frame could be decoded.

        Example:
            >>> with open_video(video_file) as video:
            ...     video.frames([0, 2, 4], short_side=24).shape
            torch.Size([3, 3, 24, 32])
        """
        wanted = [_frame_index(i, self.num_frames) for i in indices]
        if short_side is not None and (not isinstance(short_side, int) or short_side < 1):
            raise ValueError(f"short_side must be a positive integer or None, got {short_side!r}")
        images = self._decode(sorted(set(wanted)), short_side)
        if not wanted:
            return torch.empty((0, 3, 0, 0), dtype=torch.uint8)
        # Stacked as (T, H, W, 3), the order in which decoders deliver, and seen as (T, 3, H, W).
        return torch.from_numpy(np.stack([images[i] for i in wanted])).permute(0, 3, 1, 2)

    def frames_at(self, seconds: Iterable[float], short_side: int | None = None) -> Tensor:
        """Reads the frames that are on the screen at the given times.

        Args:
            seconds: Times since the first frame; after the end the last frame is repeated.
            short_side: As in `frames`.

        Returns:
            uint8 (T, 3, H, W), RGB.

        Raises:
            ValueError: A time is negative or not finite.
            VideoError: No frame could be decoded.

        Example:
            >>> with open_video(video_file) as video:
            ...     late = video.frames_at([0.5, 1e6])
            ...     late.shape, bool((late[1] == video.frames([10**6])[0]).all())
            (torch.Size([2, 3, 48, 64]), True)
        """
        return self.frames(self.indices_at(seconds), short_side)

    def indices_at(self, seconds: Iterable[float]) -> list[int]:
        """Returns the index of the frame that is on the screen at each time, as in `frames_at`."""
        times = [float(s) for s in seconds]
        for s in times:
            if not math.isfinite(s) or s < 0:
                raise ValueError(f"seconds must be finite and not negative, got {s}")
        tolerance = min(_CLOCK_ROUNDING, 0.25 / self.frames_per_second)
        found = np.searchsorted(self.times(), np.asarray(times) + tolerance, side="right") - 1
        return [int(i) for i in np.maximum(found, 0)]

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_video(
    path: str | os.PathLike[str], decoder: str = "auto", *, threads: int = 1
) -> VideoReader:
    """Opens a video file for reading.

    Args:
        path: A regular file in a video container (avi, mp4, mkv, webm, mov, mpg, ...).
        decoder: "av" (PyAV), "torchcodec", or "auto": PyAV, and torchcodec only where PyAV is
            missing. PyAV comes first because its wheel brings its own FFmpeg (the same pixels on
            every machine) and because it alone can be held to a list of containers.
        threads: Decoding threads; 0 for the decoder's choice. One is right in DataLoader workers,
            and the only number for which a damaged file gives the same frames everywhere.

    Returns:
        An open reader, also a context manager.

    Raises:
        VideoError: The file is missing, empty, no video, without frames, or no decoder is
            installed.
        ValueError: Unknown decoder, or a negative number of threads.

    Example:
        >>> with open_video(video_file) as video:
        ...     video.num_frames, video.frames_per_second, video.width, video.height
        (40, 20.0, 64, 48)
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    file = check_file(path)
    if threads < 0:
        raise ValueError(f"threads must not be negative, got {threads}")
    if decoder in ("auto", "av"):
        try:
            from ca3d.data.decode_av import AVReader
        except ImportError as error:
            if decoder == "av" or importlib.util.find_spec("torchcodec") is None:
                raise VideoError(f"{path}: PyAV is not installed: {INSTALL_AV}") from error
        else:
            return AVReader(file, threads)
    from ca3d.data.decode_torchcodec import TorchCodecReader

    return TorchCodecReader(file, threads)


def check_file(path: str | os.PathLike[str]) -> Path:
    """Checks that a path names a regular file which begins like a video container.

    Args:
        path: Any path.

    Returns:
        The path.

    Raises:
        VideoError: It is missing, a directory, a device or pipe, unreadable, empty or no video.

    Example:
        >>> check_file(video_file).suffix
        '.avi'
    """
    file = Path(path)
    try:
        # A pipe that nobody writes to would block the open for ever: look before opening.
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise VideoError(f"{path}: is a directory, give a video file")
        if not stat.S_ISREG(mode):
            raise VideoError(f"{path}: is no regular file")
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise VideoError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: cannot be read ({reason})") from error
    if not head:
        raise VideoError(f"{path}: the file is empty, copy or download it again")
    if not _is_container(head):
        raise VideoError(
            f"{path}: not a video file of a known kind (avi, mp4, mkv, webm, mov, ...)"
        )
    return file


_HEAD_BYTES = 4096
_MAGIC_AT_START = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"FLV\x01",
    b"GIF87a",
    b"GIF89a",
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
)
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"uuid")


def _is_container(head: bytes) -> bool:
    """Whether a file begins with the signature of a container that holds its frames itself.

    Playlists and scripts are text and begin otherwise. The decoder chooses among containers only;
    this second lock also covers a decoder that cannot be held to a list.
    """
    if head.startswith(_MAGIC_AT_START) or head[4:8] in _MOV_ATOMS:
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return True
    # Transport streams: a sync byte every 188 bytes (192 with a time code in front).
    return any(
        all(head[start + k * size : start + k * size + 1] == b"\x47" for k in range(4))
        for start, size in ((0, 188), (4, 192))
    )


def _frame_index(index: int, num_frames: int) -> int:
    if isinstance(index, (bool, float)) or not hasattr(index, "__index__"):
        raise TypeError(f"frame indices must be integers, got {index!r}")
    index = index.__index__()
    if index < 0:
        raise ValueError(f"frame indices must not be negative, got {index}")
    return min(index, num_frames - 1)
