"""Video frames through PyAV: seeking, timestamps, rotation and damaged files."""

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ca3d.data.av_frames import FILE_OPTIONS, SCALER, is_cover, orientation, upright
from ca3d.data.reader import VideoError, VideoReader
from ca3d.data.view import short_side_size

# Decoding up to this many unneeded frames is cheaper than a seek, which drops what the decoder has
# in flight.
_SEEK_GAP = 4

_NOTHING = "no frame can be decoded: the file is damaged, or its codec unsupported"


@dataclass(frozen=True)
class _Timeline:
    """What a scan of the packets, without decoding, tells about a stream.

    Attributes:
        pts: Presentation time of every frame in time-base units, increasing.
        keys: The part of `pts` at which decoding can begin.
        seconds: `pts` in seconds after the first frame.
        trusted: Whether `pts` identify decoded frames. If not, frames are counted from the start.
    """

    pts: np.ndarray
    keys: np.ndarray
    seconds: np.ndarray
    trusted: bool


class _UnorderedError(Exception):
    """Decoded frames do not come in the order of their timestamps."""


class _GapError(Exception):
    """A frame is missing, and frames that were left out may be nearer to it than those at hand."""


class AVReader(VideoReader):
    """Reads a video file through PyAV.

    The packets are scanned once (no decoding), so the number of frames and their times are those
    of the stream and not of the header. A frame is then decoded from the key frame before it;
    frames on the way that no other frame refers to are left out.

    Args:
        path: The file, checked by `ca3d.data.reader.check_file`.
        threads: Decoding threads, 0 for the decoder's choice.

    Raises:
        VideoError: The file is no video, has no video stream or no frames.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        self._threads = threads
        self._reformatter = VideoReformatter()
        self._closed = False
        self._leaves_out = True
        self._orientation: np.ndarray | None = None
        self._container: Any = None
        self._stream: Any = None
        self._held: Any = None
        self._reset()
        try:
            self._open()
            self._timeline = self._scan()
            self.num_frames = len(self._timeline.pts)
            self._set_rate()
            if not self._timeline.trusted:
                self._restart()  # Counting begins at the first frame, and the scan is at the end.
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; a closed reader reads no more frames."""
        self._closed = True
        self._release()

    def _release(self) -> None:
        """Lets go of the decoder at once, with its threads.

        Left to the garbage collector, it might be freed in a forked DataLoader worker, which would
        wait for ever for threads that exist in the parent only.
        """
        self._decoded.close()
        self._held = None
        container, self._container, self._stream = self._container, None, None
        if container is not None:
            container.close()

    def times(self) -> np.ndarray:
        """Returns the begin of every frame in seconds, float64 (num_frames,), increasing."""
        return self._timeline.seconds

    @property
    def width(self) -> int:  # type: ignore[override]
        """Pixels of an upright frame."""
        return self._upright_size()[0]

    @property
    def height(self) -> int:  # type: ignore[override]
        """Pixels of an upright frame."""
        return self._upright_size()[1]

    def _open(self) -> None:
        try:
            self._container = av.open(
                # The prefix keeps FFmpeg from reading a protocol out of the name.
                f"file:{self.path.absolute()}",
                metadata_errors="ignore",
                container_options=FILE_OPTIONS,
            )
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(
                f"{self.path}: not a readable video file, or a damaged one: play it in a video "
                "player, or copy or download it again"
            ) from error
        streams = self._container.streams
        # Cover pictures of audio files are video streams of one attached picture.
        videos = [s for s in streams.video if not is_cover(s)]
        if not videos:
            kind = "only sound" if streams.audio else "no video stream"
            raise VideoError(f"{self.path}: holds {kind}, give a file with pictures")
        self._stream = videos[0]
        for stream in streams:
            if stream is not self._stream and hasattr(stream, "discard"):
                stream.discard = type(stream.discard).all
        context = self._stream.codec_context
        if context is None:
            raise VideoError(f"{self.path}: the video codec is not supported, re-encode the file")
        context.thread_count = self._threads
        context.thread_type = "SLICE" if self._threads == 1 else "AUTO"
        self._reset()

    def _reset(self) -> None:
        """Forgets where decoding stands: after a seek, or a fresh open."""
        self._position: int | None = None
        self._next_count = 0
        self._held = None
        self._wanted: set[int] = set()
        self._last_wanted = 0
        self._left_out: set[int] = set()
        self._decoded: Generator[Any, None, None] = self._frames()

    def _scan(self) -> _Timeline:
        packets: list[tuple[int | None, int | None, bool]] = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.size and not getattr(packet, "is_discard", False):
                    packets.append((packet.pts, packet.dts, packet.is_keyframe))
        except (av.error.FFmpegError, OSError, EOFError):
            pass  # A file cut off in the middle: what came before is used.
        if not packets:
            raise VideoError(
                f"{self.path}: holds no frames: the recording was cut off or never finished"
            )
        known = [p[0] for p in packets if p[0] is not None]
        dts = [p[1] for p in packets if p[1] is not None]
        # AVI stores no presentation times; with frames out of order (or two in one packet) they
        # are guesses. Elsewhere a clock that jumps back has no order to rely on.
        guessed = self._container.format.name == "avi" and self._reorders()
        trusted = (
            not guessed
            and len(known) == len(packets)
            and len(set(known)) == len(known)
            and all(a <= b for a, b in itertools.pairwise(dts))
        )
        if trusted:
            pts = np.sort(np.asarray(known, dtype=np.int64))
            keys = np.sort(np.asarray([p[0] for p in packets if p[2]], dtype=np.int64))
            seconds = (pts - pts[0]) * float(self._stream.time_base)
            return _Timeline(pts, keys, seconds, True)
        counts = np.arange(len(packets), dtype=np.int64)
        return _Timeline(counts, counts[:1], counts / self._header_rate(25.0), False)

    def _reorders(self) -> bool:
        return bool(getattr(self._stream.codec_context, "has_b_frames", True))

    def _header_rate(self, default: float) -> float:
        rate = self._stream.average_rate or self._stream.guessed_rate
        return float(rate) if rate and 0 < rate < 100_000 else default

    def _set_rate(self) -> None:
        seconds = self._timeline.seconds
        span = float(seconds[-1])
        if span <= 0:
            self.frames_per_second = self._header_rate(25.0)
        else:
            measured = (self.num_frames - 1) / span
            header = self._header_rate(measured)
            # The header's rate is exact where it agrees, the measured one is rounded by the clock.
            agrees = abs(measured - header) <= 0.01 * header
            self.frames_per_second = header if agrees else measured
        last = float(np.median(np.diff(seconds))) if len(seconds) > 2 else 0.0
        self.duration = span + (last or 1.0 / self.frames_per_second)

    def _upright_size(self) -> tuple[int, int]:
        if self._orientation is None:
            self._decode([0], None)
        context = self._stream.codec_context
        turned = self._orientation is not None and self._orientation[0, 0] == 0
        size = (context.width, context.height)
        return size[::-1] if turned else size

    def _decode(self, indices: list[int], short_side: int | None) -> dict[int, np.ndarray]:
        if self._closed:
            raise ValueError(f"{self.path}: the reader is closed")
        if not indices:
            return {}
        if self._timeline.trusted:
            try:
                try:
                    return self._decode_by_time(indices, short_side)
                except _GapError:
                    self._leaves_out, self._position = False, None
                    return self._decode_by_time(indices, short_side)
            except _UnorderedError:
                counts = np.arange(self.num_frames, dtype=np.int64)
                self._timeline = _Timeline(counts, counts[:1], self._timeline.seconds, False)
                self._restart()
        return self._decode_by_count(indices, short_side)

    def _decode_by_time(self, indices: list[int], short_side: int | None) -> dict[int, np.ndarray]:
        images: dict[int, np.ndarray] = {}
        todo = list(indices)
        while todo:
            group = self._same_run(todo)
            self._run(group, images, short_side)
            todo = todo[len(group) :]
        return images

    def _same_run(self, indices: list[int]) -> list[int]:
        """Returns the leading indices that one run of the decoder reaches without another seek."""
        pts, keys = self._timeline.pts, self._timeline.keys
        end = 1
        while end < len(indices):
            key = np.searchsorted(keys, pts[indices[end]], side="right") - 1
            gap = np.searchsorted(pts, keys[key]) - indices[end - 1] if key >= 0 else 0
            if gap > _SEEK_GAP:
                break
            end += 1
        return indices[:end]

    def _run(self, group: list[int], images: dict[int, np.ndarray], short_side: int | None) -> None:
        targets = [int(self._timeline.pts[i]) for i in group]
        starts = self._starts(targets)
        for attempt, start in enumerate(starts):
            if start is not None:
                self._seek(start)
            self._wanted, self._last_wanted = set(targets), targets[-1]
            last_attempt = attempt == len(starts) - 1
            if self._collect(group, targets, images, short_side, last_attempt):
                return
        raise VideoError(f"{self.path}: {_NOTHING}")

    def _starts(self, targets: list[int]) -> list[int | None]:
        """Returns the places to begin decoding at, best first; None goes on from here."""
        pts, keys = self._timeline.pts, self._timeline.keys
        key = int(np.searchsorted(keys, targets[0], side="right")) - 1
        # A demuxer may land behind the asked time (some search by decoding time): then from the
        # key frame before that, and from the start.
        starts: list[int | None] = [int(keys[k]) for k in (key, key - 1) if k >= 0]
        starts += [int(pts[0]), int(pts[0]) - 10 * int(1 / self._stream.time_base)]
        here = self._position
        if here is not None and here < targets[0] and self._left_out.isdisjoint(targets):
            gap = np.searchsorted(pts, keys[key]) - np.searchsorted(pts, here) if key >= 0 else 0
            if gap <= _SEEK_GAP:
                starts.insert(0, None)
        return starts

    def _collect(
        self,
        group: list[int],
        targets: list[int],
        images: dict[int, np.ndarray],
        short_side: int | None,
        last_attempt: bool,
    ) -> bool:
        """Decodes until every target is met.

        Returns:
            False if decoding began too late for the first target, or gave nothing.
        """
        held: Any = None
        done = 0
        for frame in self._decoded:
            before, self._position = self._position, frame.pts
            if before is not None and frame.pts <= before:
                raise _UnorderedError
            while done < len(targets) and targets[done] < frame.pts:
                # The frame itself never came out of the decoder: show the one before it.
                if held is None and not last_attempt:
                    return False
                self._check_gap(held, targets[done])
                source = frame if held is None else held
                images[group[done]] = self._image(source, short_side)
                done += 1
            if done < len(targets) and targets[done] == frame.pts:
                images[group[done]] = self._image(frame, short_side)
                done += 1
            held = frame
            if done == len(targets):
                return True
        if held is None:
            return False
        self._check_gap(held, targets[-1])
        for index in group[done:]:
            images[index] = self._image(held, short_side)
        return True

    def _check_gap(self, held: Any, target: int) -> None:
        if any(held is None or held.pts < pts < target for pts in self._left_out):
            raise _GapError

    def _decode_by_count(self, indices: list[int], short_side: int | None) -> dict[int, np.ndarray]:
        if indices[0] < self._next_count:
            self._restart()
        images: dict[int, np.ndarray] = {}
        todo = list(indices)
        for frame in self._decoded:
            self._held = frame
            if self._next_count == todo[0]:
                images[todo.pop(0)] = self._image(frame, short_side)
            self._next_count += 1
            if not todo:
                return images
        if self._held is None:
            raise VideoError(f"{self.path}: {_NOTHING}")
        images.update((index, self._image(self._held, short_side)) for index in todo)
        return images

    def _restart(self) -> None:
        self._release()
        self._open()

    def _seek(self, pts: int) -> None:
        try:
            self._container.seek(pts, stream=self._stream, backward=True)
        except (av.error.FFmpegError, OSError):
            self._restart()
        self._reset()

    def _frames(self) -> Generator[Any, None, None]:
        """Yields decoded frames in display order; damaged packets are passed over."""
        context = self._stream.codec_context
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.FFmpegError, OSError, EOFError):
                break
            if self._timeline.trusted and packet.size:
                # Behind the last wanted frame all are decoded: the next call may want them.
                skip = (
                    self._leaves_out
                    and packet.pts is not None
                    and packet.pts < self._last_wanted
                    and packet.pts not in self._wanted
                )
                context.skip_frame = "NONREF" if skip else "DEFAULT"
                if skip:
                    self._left_out.add(packet.pts)
            if not packet.size:
                break
            yield from self._frames_of(packet)
        yield from self._frames_of(None)

    def _frames_of(self, packet: Any) -> Generator[Any, None, None]:
        try:
            frames = self._stream.codec_context.decode(packet)
        except (av.error.FFmpegError, OSError, EOFError):
            return
        yield from frames

    def _image(self, frame: Any, short_side: int | None) -> np.ndarray:
        if self._orientation is None:
            self._orientation = orientation(frame)
        context = self._stream.codec_context
        # A stream may change its size half-way: every frame is brought to the first size.
        width, height = short_side_size(context.width, context.height, short_side)
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation="BILINEAR",
            **SCALER,
        )
        return upright(rgb.to_ndarray(), self._orientation)
