"""What a watching program counts: speed, losses, lag and memory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

_MEGABYTE = 1 << 20
# Memory is compared with what it was when everything had been allocated once.
_SETTLED_SECONDS = 60.0


def resident_mb(pid: int | None = None) -> float:
    """Returns the megabytes of memory that a process holds; 0 where there is no such process.

    Args:
        pid: Its number; None for this process.

    Example:
        >>> resident_mb() > 1
        True
    """
    try:
        with open(f"/proc/{pid or 'self'}/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / _MEGABYTE


@dataclass
class Statistics:
    """Counts of one source.

    Attributes:
        frames: Frames that the model took.
        windows: Windows that it classified.
        dropped: Frames that came too fast for it.
        skipped: Packets that came too fast for the decoder.
        damaged: Packets that could not be decoded.
        gaps: Pauses that voided a window.
        restarts: Decoders started after the first.
        events: Events.
        longest_lag: Seconds from a frame's time to its being classified, at most.
        settled_mb: Memory of this process after a minute; 0 before.
        growth_mb: How much more it was at most since then.

    Example:
        >>> statistics = Statistics()
        >>> statistics.lag(0.25)
        >>> statistics.longest_lag, statistics.mean_lag
        (0.25, 0.25)
    """

    frames: int = 0
    windows: int = 0
    dropped: int = 0
    skipped: int = 0
    damaged: int = 0
    gaps: int = 0
    restarts: int = 0
    events: int = 0
    longest_lag: float = 0.0
    settled_mb: float = 0.0
    growth_mb: float = 0.0
    began: float = field(default_factory=time.monotonic)
    _lags: int = 0
    _lag_sum: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self.began

    @property
    def mean_lag(self) -> float:
        """Mean of the lags; 0 without any."""
        return self._lag_sum / self._lags if self._lags else 0.0

    def lag(self, seconds: float) -> None:
        """Adds how long after its time a window was classified."""
        self._lags += 1
        self._lag_sum += seconds
        self.longest_lag = max(self.longest_lag, seconds)

    def measure_memory(self) -> float:
        """Takes note of this process's memory, and returns it in megabytes."""
        now = resident_mb()
        if self.settled_mb:
            self.growth_mb = max(self.growth_mb, now - self.settled_mb)
        elif self.seconds >= _SETTLED_SECONDS:
            self.settled_mb = now
        return now

    def line(self, decoder_pid: int | None = None) -> str:
        """Returns everything in one line.

        Args:
            decoder_pid: The decoder, whose memory is shown too.
        """
        memory = f"memory {self.measure_memory():.0f} MB"
        if self.settled_mb:
            memory += f" (grew {self.growth_mb:.1f} MB since the first minute)"
        if decoder_pid is not None and (decoder := resident_mb(decoder_pid)):
            memory += f" + decoder {decoder:.0f} MB"
        return (
            f"{self.seconds:.0f} s: {self.frames} frames ({self.frames / self.seconds:.2f}/s),"
            f" {self.windows} windows, {self.events} events; dropped {self.dropped}, undecoded"
            f" {self.skipped}, damaged {self.damaged}, gaps {self.gaps}, restarts {self.restarts};"
            f" lag {self.mean_lag:.2f} s, at most {self.longest_lag:.2f} s; {memory}"
        )
