"""Reads a source and yields a model's frames; also a process of its own (`python -m`).

Torch is not imported here: the process that opens foreign video is small and can be started again
in a moment.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

from ca3d.data.av_frames import FILE_OPTIONS, is_cover
from ca3d.data.view import View
from ca3d.errors import UserError
from ca3d.watch.limits import apply_limits
from ca3d.watch.messages import Frame, Notice, write_message
from ca3d.watch.pace import Pace
from ca3d.watch.peers import check_peers, open_sockets
from ca3d.watch.picture import Pictures
from ca3d.watch.request import Request
from ca3d.watch.resample import Gap, Resampler

# FFmpeg opens nothing but the camera: not what a playlist or a session description names.
RTSP_OPTIONS = {
    "tcp": {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,tcp"},
    "udp": {"rtsp_transport": "udp", "protocol_whitelist": "rtsp,rtp,udp,tcp"},
}
_WEBCAM_OPTIONS = {"format_whitelist": "video4linux2,v4l2"}
# A demuxer that fails so often in a row has nothing more to give.
_MOST_DEMUX_ERRORS = 50
# While no frame comes, the process says that it is alive, seconds apart.
_ALIVE_SECONDS = 1.0


def read_frames(request: Request) -> Iterator[Frame | Notice]:
    """Opens a source and yields what the model is to see, until the source ends.

    Args:
        request: What to read, and how.

    Yields:
        Frames at the model's rate, and notices, of which the last one says why it is the last.

    Example:
        >>> request = Request("file", str(video_file), resize=32, size=32, frames_per_second=10.0)
        >>> *_, frame, end = read_frames(request)
        >>> frame.pixels.shape, end.kind
        ((32, 32, 3), 'end')
    """
    sockets = open_sockets() if request.kind == "rtsp" else set()
    try:
        with _open(request) as container:
            if request.kind == "rtsp":
                check_peers(request.address, open_sockets() - sockets)
            yield from _Reading(request, container).run()
    except UserError as error:
        yield Notice("failed", request.redact(str(error)))
    except MemoryError:
        yield Notice("failed", _too_large(request))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        yield _explain(error, request)


def _open(request: Request) -> Any:
    timeout = (request.timeout, request.timeout)
    if request.kind == "rtsp":
        options = dict(RTSP_OPTIONS[request.transport])
        if request.address.startswith("rtsps:"):
            options["protocol_whitelist"] += ",tls"
        return av.open(request.url, format="rtsp", container_options=options, timeout=timeout)
    if request.kind == "webcam":
        return av.open(request.address, format="v4l2", container_options=_WEBCAM_OPTIONS)
    # The prefix keeps FFmpeg from reading a protocol out of the name.
    address = f"file:{os.path.abspath(request.address)}"
    return av.open(address, metadata_errors="ignore", container_options=FILE_OPTIONS)


class _Reading:
    """One open source."""

    def __init__(self, request: Request, container: Any) -> None:
        self._request, self._container = request, container
        self._stream = self._video_stream()
        context = self._stream.codec_context
        context.thread_count, context.thread_type = 1, "SLICE"
        rate = self._stream.average_rate or self._stream.guessed_rate
        self._rate = float(rate) if rate and 0 < rate < 1000 else 25.0
        period = request.stride / (request.frames_per_second or self._rate)
        self._resampler: Resampler[Any] = Resampler(period)
        self._pictures = Pictures(View.parse(request.view), request.resize, request.size)
        self._pace = Pace(request.paced, request.live)
        self._first: float | None = None
        self._decoded = self._damaged = self._told_damaged = 0
        self._spoke = time.monotonic()
        self._shown: Any = None
        self._pixels = np.empty((0, 0, 3), dtype=np.uint8)

    def run(self) -> Iterator[Frame | Notice]:
        yield Notice(
            "opened",
            values={
                "codec": self._stream.codec_context.name,
                "rate": self._rate,
                "period": self._resampler.period,
            },
        )
        if self._request.begin > 0:
            self._seek(self._request.begin)
        for frame in self._frames():
            if frame is None:
                yield from self._alive()
                continue
            seconds = self._seconds(frame)
            if seconds < self._request.begin:
                continue
            yield from self._sized(frame)
            self._pace.wait(seconds)
            yield from self._wanted(self._resampler.push(seconds, frame))
        yield from self._wanted(list(self._resampler.finish()))
        yield self._end()

    def _video_stream(self) -> Any:
        streams = self._container.streams
        videos = [s for s in streams.video if not is_cover(s)]
        if not videos:
            kind = "only sound" if streams.audio else "no video stream"
            raise UserError(f"{self._request.name}: holds {kind}, give a source with pictures")
        stream = videos[0]
        for other in streams:
            if other is not stream and hasattr(other, "discard"):
                other.discard = type(other.discard).all
        if stream.codec_context is None:
            raise UserError(f"{self._request.name}: the video codec is not supported")
        return stream

    def _frames(self) -> Iterator[Any]:
        """Yields decoded frames, and None where a packet gave none."""
        context = self._stream.codec_context
        for packet in self._packets():
            context.skip_frame = "NONKEY" if self._pace.behind else "DEFAULT"
            try:
                frames = context.decode(packet)
            except MemoryError:
                raise
            except (av.error.FFmpegError, OSError, EOFError) as error:
                if getattr(error, "errno", None) == errno.ENOMEM:
                    raise MemoryError from error
                self._damaged += 1
                frames = []
            if self._pace.behind and not frames and packet is not None:
                self._pace.skipped += 1
            self._decoded += len(frames)
            yield from frames or [None]

    def _packets(self) -> Iterator[Any]:
        errors = 0
        while True:
            try:
                for packet in self._container.demux(self._stream):
                    errors = 0
                    if not packet.size:
                        yield None
                        return
                    yield packet
            except (BlockingIOError, InterruptedError):
                continue
            except (av.error.FFmpegError, OSError, EOFError) as error:
                errors += 1
                # A damaged file goes on behind the damage, a camera that is gone does not.
                if self._request.kind != "file" and not isinstance(
                    error, av.error.InvalidDataError
                ):
                    raise
                if errors > _MOST_DEMUX_ERRORS or isinstance(error, EOFError):
                    yield None
                    return
                self._damaged += 1

    def _seconds(self, frame: Any) -> float:
        if frame.pts is not None:
            time_base = frame.time_base or self._stream.time_base
            seconds = float(frame.pts * time_base)
        elif self._request.kind == "file":
            seconds = (self._decoded - 1) / self._rate
        else:
            seconds = time.monotonic()
        if self._first is None:
            start = self._stream.start_time
            sought = self._request.begin > 0 and start is not None
            self._first = float(start * self._stream.time_base) if sought else seconds
        return seconds - self._first

    def _seek(self, seconds: float) -> None:
        begin = self._stream.start_time or 0
        where = begin + int(seconds / self._stream.time_base)
        try:
            self._container.seek(where, stream=self._stream, backward=True)
        except (av.error.FFmpegError, OSError):
            return  # What comes before is decoded and left out.

    def _sized(self, frame: Any) -> Iterator[Notice]:
        if self._pictures.notice_size(frame):
            width, height = self._pictures.frame_size or (0, 0)
            region = list(self._pictures.region)
            yield self._say("resized", width=width, height=height, region=region)

    def _wanted(self, points: list[Any]) -> Iterator[Frame | Notice]:
        for point in points:
            if isinstance(point, Gap):
                if point.seconds < 0:
                    self._pace.restart()
                yield self._say("gap", start=point.start, seconds=point.seconds)
                continue
            seconds, frame = point
            if frame is not self._shown:
                self._shown = frame
                self._pixels = self._pictures.picture(frame)
            self._spoke = time.monotonic()
            yield Frame(seconds, self._pace.due(seconds), self._pixels)
        yield from self._counts()

    def _counts(self) -> Iterator[Notice]:
        if self._damaged > self._told_damaged:
            self._told_damaged = self._damaged
            yield self._say("damaged", count=self._damaged)
        if self._pace.skipped > self._pace.told:
            self._pace.told = self._pace.skipped
            yield self._say("skipped", count=self._pace.skipped)

    def _alive(self) -> Iterator[Notice]:
        if time.monotonic() - self._spoke > _ALIVE_SECONDS:
            yield self._say("alive")
            yield from self._counts()

    def _say(self, kind: str, **values: Any) -> Notice:
        self._spoke = time.monotonic()
        return Notice(kind, values=values)

    def _end(self) -> Notice:
        name = self._request.name
        if not self._decoded and not self._request.begin:
            text = f"{name}: no frame can be decoded: damaged, or its codec unsupported"
            return Notice("failed" if self._request.kind == "file" else "lost", text)
        if self._request.kind == "file":
            return Notice("end", values={"decoded": self._decoded, "damaged": self._damaged})
        return Notice("lost", f"{name}: the stream ended")


def _explain(error: Exception, request: Request) -> Notice:
    """Says in one line what went wrong; PyAV's own text holds the whole address."""
    name = request.name
    if isinstance(error, (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError)):
        return Notice(
            "failed",
            f"{name}: the camera refuses the user name or password; give them by --credentials",
        )
    number = getattr(error, "errno", None)
    if number == errno.ENOMEM:
        return Notice("failed", _too_large(request))
    if request.kind == "file":
        return Notice("failed", f"{name}: not a readable video file, or a damaged one")
    if request.kind == "webcam":
        reasons = {
            errno.ENOENT: "there is no such webcam",
            errno.EACCES: "may not be opened by this user (group video?)",
            errno.EBUSY: "is used by another program",
        }
        reason = reasons.get(number or 0, "cannot be read")
        return Notice("lost", f"{name}: {reason}")
    reasons = {
        errno.ECONNREFUSED: "nothing listens there (connection refused)",
        errno.EHOSTUNREACH: "the camera's network cannot be reached",
        errno.ENETUNREACH: "the camera's network cannot be reached",
        errno.ETIMEDOUT: f"no answer within {request.timeout:g} s",
        errno.EIO: "the camera's name cannot be found, or the connection broke",
    }
    if isinstance(error, av.error.ExitError):
        reason = reasons[errno.ETIMEDOUT]
    elif isinstance(error, av.error.HTTPNotFoundError):
        reason = "the camera has no such stream"
    elif isinstance(error, (EOFError, av.error.EOFError)):
        reason = "the camera closed the connection"
    else:
        reason = reasons.get(number or 0, type(error).__name__)
    return Notice("lost", f"{name}: {reason}")


def _too_large(request: Request) -> str:
    return (
        f"{request.name}: its frames need more than the {request.memory_mb} MB that the decoder may"
        " use; --decoder-memory allows more"
    )


def main() -> None:
    """Reads a request, one line of standard input, and writes messages to standard output.

    It ends when standard input does, with the program that asked.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing but messages may reach the pipe.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = Request.from_json(sys.stdin.readline())
    threading.Thread(target=_follow_parent, daemon=True).start()
    apply_limits(request.memory_mb)
    status = 0
    try:
        for message in read_frames(request):
            write_message(output, message)
    except BrokenPipeError:
        pass  # The program that asked has gone.
    except BaseException:
        traceback.print_exc()
        status = 1
    # No clean-up: a camera that is gone could make it wait.
    os._exit(status)


def _follow_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
