"""Frames in, events out: one source from its begin to its end."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

from ca3d.data.view import View
from ca3d.watch.classifier import Classifier
from ca3d.watch.clips import ClipSaver
from ca3d.watch.display import Display, clock
from ca3d.watch.events import Event, EventDetector
from ca3d.watch.feed import Feed
from ca3d.watch.messages import Frame, Notice
from ca3d.watch.records import EventLog
from ca3d.watch.resample import LONGEST_PAUSE
from ca3d.watch.statistics import Statistics

_STATISTICS_SECONDS = 10.0
_MEMORY_SECONDS = 1.0


class Watcher:
    """Watches one source.

    Args:
        feed: Where frames and notices come from.
        classifier: The model.
        detector: Makes events of its probabilities.
        log: Where events go.
        display: Where everything else goes.
        clips: Saves clips of events; None for none.
        show_statistics: Print the statistics from time to time.

    Attributes:
        statistics: What was counted.
        failure: Why the source could not be read to its end; empty when it was.
    """

    def __init__(
        self,
        feed: Feed,
        classifier: Classifier,
        detector: EventDetector,
        log: EventLog,
        display: Display,
        clips: ClipSaver | None = None,
        show_statistics: bool = False,
    ) -> None:
        self.feed, self.classifier, self.detector = feed, classifier, detector
        self.log, self.display, self.clips = log, display, clips
        self.statistics = Statistics()
        self.failure = ""
        self._show_statistics = show_statistics
        self._request = feed.request
        self._live = feed.request.kind != "file"
        self._began = datetime.datetime.now().astimezone() if self._live else None
        self._period = 1.0
        self._told_slow = False
        self._next_statistics = self._next_memory = 0.0
        self._dropped = 0
        self._counted: dict[str, int] = {}

    def run(self) -> None:
        """Watches until the source ends."""
        self.classifier.reset()
        self.statistics.began = time.monotonic()
        self._next_statistics = _STATISTICS_SECONDS
        handlers: dict[str, Callable[[Notice], None]] = {
            "opened": self._opened,
            "resized": self._resized,
            "gap": self._gap,
            "lost": self._lost,
            "failed": self._failed,
        }
        try:
            for item in self.feed:
                if isinstance(item, Frame):
                    self._frame(item)
                elif item.kind in ("damaged", "skipped"):
                    # Every connection counts from 0.
                    before = self._counted.get(item.kind, 0)
                    setattr(self.statistics, item.kind, before + item.values["count"])
                elif item.kind in handlers:
                    handlers[item.kind](item)
                self._count()
        finally:
            self._report(self.detector.interrupt())
            self.display.close()

    def _frame(self, frame: Frame) -> None:
        self.statistics.frames += 1
        if self.clips is not None:
            self.clips.add(frame.time, frame.pixels)
        logits = self.classifier.push(frame.pixels)
        if logits is None:
            return
        self.statistics.windows += 1
        if self._request.live:
            self.statistics.lag(time.monotonic() - frame.clock)
        if not bool(logits.isfinite().all()):
            self.display.note("the model's output is not finite: the window is left out")
            self._report(self.detector.interrupt())
            return
        half = (self.classifier.info.frames - 1) * self._period / 2
        probabilities = self.detector.calibration.probabilities(logits).tolist()
        self._report(self.detector.push(frame.time - half, frame.time, probabilities))

    def _report(self, events: list[Event]) -> None:
        for event in events:
            clip = None
            if event.lasting:
                self.statistics.events += 1
            elif self.clips is not None:
                clip = self.clips.save(event)
            self.display.event(event)
            self.log.write(event, self._request.name, self._began, str(clip) if clip else None)

    def _void(self) -> None:
        """Forgets the window: frames behind a gap do not belong to those before it."""
        self.classifier.reset()
        self._report(self.detector.interrupt())

    def _opened(self, notice: Notice) -> None:
        values = notice.values
        self._period = float(values["period"])
        if self.clips is not None:
            self.clips.begin(self._period)
        self.display.note(
            f"{self._request.name}: {values['codec']}, {values['rate']:.4g} frames/s; the model"
            f" sees {1 / self._period:.4g} a second"
        )
        if self._period * LONGEST_PAUSE < 0.99 / values["rate"]:
            self.display.note(
                f"warning: {values['rate']:.3g} frames/s are too few for this model, which needs at"
                f" least {1 / (self._period * LONGEST_PAUSE):.3g}: no window will be complete"
            )

    def _resized(self, notice: Notice) -> None:
        left, top, width, height = notice.values["region"]
        size = f"{notice.values['width']}x{notice.values['height']}"
        self.display.note(
            f"frames of {size}; the model sees {width}x{height} at ({left}, {top}), view"
            f" {View.parse(self._request.view)}"
        )

    def _gap(self, notice: Notice) -> None:
        self.statistics.gaps += 1
        start, seconds = notice.values["start"], notice.values["seconds"]
        dropped = notice.values.get("dropped")
        if dropped is None and seconds < 0:
            text = f"{clock(start)}  the clock jumped back by {-seconds:.2f} s: a new window"
        elif dropped is None:
            text = f"{clock(start)}  no frames for {seconds:.2f} s: the window begins anew"
        else:
            text = f"{clock(start)}  {dropped} frames dropped, the model is late: a new window"
        # Behind the hundredth they only count.
        if self.statistics.gaps <= 100:
            self.display.note(text)
        self._void()

    def _lost(self, notice: Notice) -> None:
        wait = notice.values.get("wait", 0.0)
        self.statistics.restarts += 1
        for kind in ("damaged", "skipped"):
            self._counted[kind] = getattr(self.statistics, kind)
        again = f"; again in {wait:g} s" if wait else "; a new one is started"
        self.display.note(f"{notice.text}{again}")
        self._void()

    def _failed(self, notice: Notice) -> None:
        self.failure = notice.text

    def _count(self) -> None:
        statistics = self.statistics
        statistics.dropped = self.feed.buffer.dropped
        seconds = statistics.seconds
        if seconds >= self._next_memory:
            self._next_memory = seconds + _MEMORY_SECONDS
            statistics.measure_memory()
        if self._show_statistics and seconds >= self._next_statistics:
            self._next_statistics += _STATISTICS_SECONDS
            self.display.note(statistics.line(self.feed.decoder_pid))
        state, confidence = self.detector.state, self.detector.confidence
        self.display.status(
            f"{clock(seconds)}  {state} {100 * confidence:.0f} %   {statistics.frames} frames,"
            f" {statistics.dropped} dropped, {statistics.gaps} gaps, {statistics.restarts} restarts"
        )
