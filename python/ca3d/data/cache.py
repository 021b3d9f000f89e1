"""Frames of a data set, resized and decoded once, so that training reads them fast.

Beside each other in the cache folder: `cache.json` (size and format) and for every video, under its
own relative path, an `.index` (a line of JSON with the size and time stamp of the source and more,
then the times of the frames and the places of the images) and its frames, either as one `.npy`
array or as JPEG images one after the other (`.jpegs`, quality 95, colour not subsampled). The index
is written last: a video without one is not in the cache.
"""

import io
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ca3d.data.reader import VideoError, VideoReader, open_video
from ca3d.data.samples import find_samples, load_samples, splits_of
from ca3d.data.view import short_side_size
from ca3d.errors import UserError

FORMATS = ("jpeg", "npy")
DEFAULT_FOLDER = ".ca3d-cache"
Progress = Callable[[int, int, str], None]

_VERSION = 2
_FRAME_SUFFIX = {"jpeg": ".jpegs", "npy": ".npy"}
_JPEG_QUALITY = 95
_CHUNK = 64  # frames held in memory while a video is written


@dataclass
class CacheReport:
    """What `build` did.

    Attributes:
        folder: The cache.
        written: Videos written now.
        kept: Videos that were there already, unchanged.
        broken: Videos that cannot be read, with the reason.
        bytes: Size of the cache's frames.
    """

    folder: Path
    written: int = 0
    kept: int = 0
    broken: dict[Path, str] = field(default_factory=dict)
    bytes: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.written} videos written, {self.kept} kept, "
            f"{len(self.broken)} unreadable; {self.bytes / 1e6:.1f} MB"
        ]
        return "\n".join([*lines, *(f"  {reason}" for reason in self.broken.values())])


class FrameCache:
    """A cache folder made by `build`.

    Args:
        folder: The cache.
        root: The data set whose videos it holds.

    Raises:
        UserError: The folder holds no cache, or one of another version.
    """

    def __init__(self, folder: str | os.PathLike[str], root: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.root = Path(root)
        settings = _settings(self.folder)
        if settings is None:
            raise UserError(f"{folder}: no frame cache, make one with: ca3d data cache {root}")
        self.short_side: int = settings["short_side"]
        self.format: str = settings["format"]

    @staticmethod
    def find(
        root: str | os.PathLike[str], cache: str | os.PathLike[str] | None, short_side: int
    ) -> "FrameCache | None":
        """Returns the cache to read from.

        Args:
            root: The data set.
            cache: A cache folder; "auto" for the one in the data set, if it is there; None for
                none.
            short_side: Pixels that are needed; "auto" passes over a smaller cache.

        Raises:
            UserError: The given folder holds no cache, or one of smaller frames.
        """
        if cache is None:
            return None
        if cache == "auto":
            folder = Path(root) / DEFAULT_FOLDER
            found = FrameCache(folder, root) if _settings(folder) is not None else None
            return found if found is not None and found.short_side >= short_side else None
        given = FrameCache(cache, root)
        if given.short_side < short_side:
            raise UserError(
                f"{cache}: holds frames of {given.short_side} pixels, {short_side} are needed: "
                f"make another cache with that size"
            )
        return given

    def open(self, path: Path, decoder: str = "auto") -> VideoReader | None:
        """Returns a reader of a video's cached frames.

        Returns:
            None if the video is not in the cache, or has changed since.
        """
        index = _index_file(self.folder, self.root, path)
        if index is None:
            return None
        content = _read_index(index, path)
        if content is None:
            return None
        return _CachedReader(path, index.with_suffix(_FRAME_SUFFIX[self.format]), content)


def build(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    short_side: int = 128,
    *,
    format: str = "jpeg",
    workers: int = 2,
    decoder: str = "auto",
    progress: Progress | None = None,
) -> CacheReport:
    """Writes every video's frames, resized, into a cache that `VideoFolder` reads.

    Videos that are in the cache already and have not changed (size and modification time) are kept,
    so an interrupted run goes on where it was. Frames keep their number and time.

    Args:
        root: The data set; the videos of all its splits are taken.
        out: Cache folder; None for ROOT/.ca3d-cache, where `VideoFolder` finds it.
        short_side: Pixels of a frame's shorter side, at most. Larger than a clip needs is allowed;
            smaller videos keep their size.
        format: "jpeg" (about 5 to 11 kB a frame of 112 pixels), or "npy" (exact and faster to
            read, about 50 kB).
        workers: Videos at a time.
        decoder: As in `ca3d.data.reader.open_video`.
        progress: Called after each video with (done, total, path).

    Returns:
        What was done.

    Raises:
        UserError: Empty data set, a cache of another size or format in `out`, or a full disk.
        ValueError: An argument is out of range.

    Example:
        >>> report = build(dataset_root, scratch / "cache", short_side=32)
        >>> report.written, report.kept, report.broken
        (10, 0, {})
    """
    if format not in FORMATS:
        raise ValueError(f"format must be jpeg or npy, got {format!r}")
    if short_side < 1 or workers < 1:
        raise ValueError(
            f"short_side and workers must be at least 1, got {short_side} and {workers}"
        )
    samples, _ = load_samples(root) if splits_of(root) else (find_samples(root), [])
    folder = Path(out) if out is not None else Path(root) / DEFAULT_FOLDER
    _claim(folder, short_side, format)
    videos = sorted({s.path for s in samples})
    report = CacheReport(folder)
    with ThreadPoolExecutor(workers) as pool:
        jobs = {
            pool.submit(_build_one, path, folder, Path(root), short_side, format, decoder): path
            for path in videos
        }
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                path = jobs[job]
                try:
                    report.written += job.result()
                    report.kept += not job.result()
                except VideoError as error:
                    report.broken[path] = str(error)
                if progress is not None:
                    progress(done, len(videos), str(path))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
        finally:
            pool.shutdown(cancel_futures=True)
    report.bytes = sum(p.stat().st_size for p in folder.rglob(f"*{_FRAME_SUFFIX[format]}"))
    return report


class _CachedReader(VideoReader):
    """Reads the frames of one video from a cache; `path` stays the source's."""

    def __init__(self, path: Path, frames: Path, index: Mapping[str, Any]) -> None:
        self.path = path
        self._file = frames
        self._times = index["times"]
        self._offsets = index["offsets"]
        self.num_frames = len(self._times)
        self.frames_per_second = index["frames_per_second"]
        self.duration = index["duration"]
        self.width, self.height = index["size"]

    def times(self) -> np.ndarray:
        """Returns the begin of every frame in seconds, float64 (num_frames,), increasing."""
        return self._times

    def close(self) -> None:
        """Does nothing: no file is held open."""

    def _decode(self, indices: list[int], short_side: int | None) -> dict[int, np.ndarray]:
        if not indices:
            return {}
        try:
            images = self._stored(indices)
        except (OSError, ValueError, RuntimeError) as error:
            raise VideoError(
                f"{self._file}: damaged cache file, delete it and build the cache again"
            ) from error
        size = short_side_size(self.width, self.height, short_side)
        if size != (self.width, self.height):
            chw = torch.from_numpy(images).permute(0, 3, 1, 2)
            resized = F.resize(chw, [size[1], size[0]], antialias=True)
            images = resized.permute(0, 2, 3, 1).numpy()
        return dict(zip(indices, images, strict=True))

    def _stored(self, indices: list[int]) -> np.ndarray:
        if self._file.suffix == ".npy":
            # Its header says what the index says, and takes NumPy longer to parse than a clip to
            # read.
            shape = (self.num_frames, self.height, self.width, 3)
            begin = int(self._offsets[0])
            frames = np.memmap(self._file, np.uint8, "r", offset=begin, shape=shape)
            return np.asarray(frames[indices])
        images = []
        with self._file.open("rb") as stream:
            for i in indices:
                stream.seek(int(self._offsets[i]))
                data = stream.read(int(self._offsets[i + 1] - self._offsets[i]))
                images.append(np.asarray(Image.open(io.BytesIO(data))))
        return np.stack(images)


def _build_one(
    path: Path, folder: Path, root: Path, short_side: int, format: str, decoder: str
) -> bool:
    """Caches one video; returns False if it was there already."""
    index = _index_file(folder, root, path)
    if index is None:
        raise VideoError(f"{path}: lies outside the data set, not cached")
    frames_file = index.with_suffix(_FRAME_SUFFIX[format])
    if frames_file.is_file() and _read_index(index, path) is not None:
        return False
    index.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat() if path.exists() else None
    with open_video(path, decoder) as reader:
        offsets, size = _write_frames(reader, frames_file, short_side)
        head = {
            "frames_per_second": float(reader.frames_per_second),
            "duration": float(reader.duration),
            "size": size,
            "source": _stamp(before or path.stat()),
            "frames": reader.num_frames,
            "offsets": len(offsets),
        }
        arrays = reader.times().astype("<f8").tobytes() + offsets.astype("<i8").tobytes()
    _replace(index, json.dumps(head).encode() + b"\n" + arrays)
    return True


def _write_frames(
    reader: VideoReader, file: Path, short_side: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Writes a video's frames; returns where the images begin in the file (of an array, where the
    first one does), and (width, height)."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    offsets, size = [0], (0, 0)
    # A small video loses nothing as it is.
    short_side = min(short_side, reader.width, reader.height)
    try:
        with temporary.open("wb") as stream:
            for start in range(0, reader.num_frames, _CHUNK):
                chunk = range(start, min(start + _CHUNK, reader.num_frames))
                images = reader.frames(chunk, short_side).permute(0, 2, 3, 1).contiguous().numpy()
                size = images.shape[2], images.shape[1]
                if file.suffix == ".npy":
                    if start == 0:
                        shape = (reader.num_frames, *images.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(stream, header)
                        offsets = [stream.tell()]
                    stream.write(images.data)
                    continue
                for image in images:
                    stream.write(_jpeg(image))
                    offsets.append(stream.tell())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return np.asarray(offsets, dtype=np.int64), size


def _jpeg(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return data.getvalue()


def _index_file(folder: Path, root: Path, path: Path) -> Path | None:
    try:
        inside = path.absolute().relative_to(root.absolute())
    except ValueError:
        return None
    return folder / inside.with_name(inside.name + ".index")


def _read_index(index: Path, source: Path) -> Mapping[str, Any] | None:
    """Returns a video's index if it is whole and the source has not changed since."""
    try:
        head, _, arrays = index.read_bytes().partition(b"\n")
        content = json.loads(head)
        frames, offsets = content["frames"], content["offsets"]
        whole = len(arrays) == 8 * (frames + offsets)
        if not whole or content["source"] != _stamp(source.stat()):
            return None
        times = np.frombuffer(arrays, "<f8", frames)
        places = np.frombuffer(arrays, "<i8", offsets, 8 * frames)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return {**content, "times": times, "offsets": places}


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]


def _settings(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise UserError(f"{folder}: a frame cache of another version, delete it")
    return content


def _claim(folder: Path, short_side: int, format: str) -> None:
    wanted = {"version": _VERSION, "short_side": short_side, "format": format}
    have = _settings(folder)
    if have is not None and have != wanted:
        raise UserError(
            f"{folder}: holds a cache of {have['short_side']} pixels in {have['format']}: choose "
            "another folder, or delete it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "cache.json", json.dumps(wanted).encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
