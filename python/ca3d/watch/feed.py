"""A source that goes on: cameras are found again, dead decoders are replaced."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator

from ca3d.watch.buffer import FrameBuffer
from ca3d.watch.messages import Frame, Notice
from ca3d.watch.process import DecoderProcess
from ca3d.watch.request import Request

# Seconds before the first, second ... attempt to find a lost camera again.
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
# A decoder that died at some place of a file is sent on behind it, this many seconds, so often.
_LEAP_SECONDS = 1.0
_MOST_CRASHES = 5


class Feed:
    """Frames and notices of one source, from a thread of its own.

    A camera that is lost, at the start or later, is tried again after 1, 2, 4 ... 60 seconds. A
    decoder that died is replaced; in a file the new one begins a second behind the place. A notice
    `lost` stands in between.

    Args:
        request: What to read.
        capacity: Most frames that wait for the model.
        attempts: How often in a row a lost camera is tried again; None for ever.
        back_off: Seconds before each attempt; the last number repeats.
        silence: Seconds without a message after which a decoder is replaced.

    Attributes:
        buffer: Where the items wait.
        restarts: Decoders started after the first.

    Example:
        >>> with Feed(Request("file", str(video_file), resize=32, size=32)) as feed:
        ...     kinds = [item.kind for item in feed if isinstance(item, Notice)]
        >>> kinds[0], kinds[-1]
        ('opened', 'end')
    """

    def __init__(
        self,
        request: Request,
        capacity: int = 16,
        attempts: int | None = None,
        back_off: tuple[float, ...] = BACK_OFF,
        silence: float = 20.0,
    ) -> None:
        self.request, self.attempts, self.back_off = request, attempts, back_off
        self.silence = silence
        self.buffer = FrameBuffer(capacity, drop=request.live)
        self.restarts = 0
        self._process: DecoderProcess | None = None
        self._stopping = threading.Event()
        self._began = 0.0
        self._reached = 0.0
        self._offset: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Feed:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self.buffer.close()
        if self._process is not None:
            self._process.stop()
        self._thread.join(timeout=5)

    def __iter__(self) -> Iterator[Frame | Notice]:
        """Yields until the source has ended for good; the last item says why."""
        while True:
            item = self.buffer.get()
            if item is None:
                return
            yield item
            if isinstance(item, Notice) and item.kind in ("end", "failed"):
                return

    @property
    def decoder_pid(self) -> int | None:
        """Process number of the running decoder."""
        return self._process.pid if self._process is not None else None

    def _run(self) -> None:
        try:
            self._supervise()
        except Exception as error:
            # The thread that watches must not wait for ever for one that has died.
            text = self.request.redact(f"{self.request.name}: {type(error).__name__}: {error}")
            self.buffer.put(Notice("failed", text))
            raise

    def _supervise(self) -> None:
        losses = crashes = 0
        while not self._stopping.is_set():
            before = self._reached
            request = self.request
            if request.kind == "file" and self._reached:
                request = dataclasses.replace(request, begin=self._reached + _LEAP_SECONDS)
            self._offset = None if request.kind != "file" else 0.0
            self._process = DecoderProcess(request, self.silence)
            if self._stopping.is_set():
                return
            last = self._process.run(self._hand_on)
            if self._stopping.is_set():
                return
            if last.kind in ("end", "failed"):
                self.buffer.put(last)
                return
            moved = self._reached > before
            losses = 1 if moved else losses + 1
            crashes += 1
            if request.kind == "file" and crashes > _MOST_CRASHES:
                self.buffer.put(Notice("failed", f"{last.text}; {crashes} times: giving up"))
                return
            if self.attempts is not None and losses > self.attempts:
                self.buffer.put(Notice("failed", f"{last.text}; tried {losses} times: giving up"))
                return
            wait = 0.0
            if request.kind != "file":
                wait = self.back_off[min(losses, len(self.back_off)) - 1]
            self.buffer.put(Notice("lost", last.text, {"wait": wait}))
            self._reached = max(self._reached, before + _LEAP_SECONDS)
            self._stopping.wait(wait)
            self.restarts += 1

    def _hand_on(self, message: Frame | Notice) -> None:
        if isinstance(message, Frame):
            if self._offset is None or message.time + self._offset < self._reached:
                # A camera's clock begins anew with every connection, any source's may jump back;
                # ours goes on, and what was before a loss may have been ahead of it.
                live = self.request.kind != "file"
                now = time.monotonic() - self._began if live else 0.0
                self._offset = max(now, self._reached) - message.time
            message = dataclasses.replace(message, time=message.time + self._offset)
            self._reached = max(self._reached, message.time)
        elif message.kind == "gap":
            start = message.values["start"] + (self._offset or 0.0)
            start = max(start, self._reached)
            message = dataclasses.replace(message, values={**message.values, "start": start})
        self.buffer.put(message)
