"""Saving what the model saw of an event, for as long as the user wants."""

from __future__ import annotations

import os
import re
import stat
import time
from collections import deque
from fractions import Fraction
from pathlib import Path

import numpy as np

from ca3d.errors import UserError
from ca3d.files import write_atomically
from ca3d.watch.events import Event

# ca3d-DATE-TIME-PROCESS-NUMBER-LABEL.avi: nothing else in the folder is ours to delete.
_OURS = re.compile(r"ca3d-\d{8}-\d{6}-\d+-\d{4,}-.*\.avi")
# Before and behind the event, and of a long one the end.
_MARGIN_SECONDS = 1.0
_LONGEST_SECONDS = 30.0
# Clips grow old in front of a quiet camera too.
_TIDY_SECONDS = 60.0


class ClipSaver:
    """Saves events as small videos, readable by their owner only, and deletes old ones.

    A clip shows the region and the few pixels that the model saw. Only files that this class
    names are ever deleted.

    Args:
        folder: Where to; made when missing, for its owner only.
        keep_days: Age at which a clip is deleted; None for never.
        max_gb: Most gigabytes (10^9 bytes) of clips; None for no bound.

    Raises:
        ca3d.errors.UserError: The folder can't be used.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> saver = ClipSaver(folder)
        >>> saver.begin(period=0.1)
        >>> for i in range(30):
        ...     saver.add(0.1 * i, np.zeros((32, 32, 3), dtype=np.uint8))
        >>> file = saver.save(Event("fall", 1.0, 2.0, 0.9, 1.5))
        >>> oct(file.stat().st_mode & 0o777), file.name.endswith("-fall.avi")
        ('0o600', True)
    """

    def __init__(
        self,
        folder: str | Path,
        keep_days: float | None = None,
        max_gb: float | None = None,
    ) -> None:
        self.folder, self._period = Path(folder), 1.0
        self._keep_days, self._max_gb = keep_days, max_gb
        self._frames: deque[tuple[float, np.ndarray]] = deque(maxlen=1)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save-clips {folder}: {error.strerror}") from error
        self._saved = 0
        self.tidy()

    def begin(self, period: float) -> None:
        """Begins with a source, and forgets the frames of the one before.

        Args:
            period: Seconds from frame to frame.
        """
        seconds = _LONGEST_SECONDS + 2 * _MARGIN_SECONDS
        self._period, self._frames = period, deque(maxlen=int(seconds / period) + 1)

    def add(self, seconds: float, picture: np.ndarray) -> None:
        """Remembers a frame for a while.

        Args:
            seconds: Its time.
            picture: uint8 (H, W, 3).
        """
        self._frames.append((seconds, picture))
        if self._keep_days is not None and time.monotonic() > self._next_tidy:
            self.tidy()

    def save(self, event: Event) -> Path | None:
        """Writes the clip of an event that has ended.

        Args:
            event: The event.

        Returns:
            The file, or None when no frame of the event is remembered any more, or when the clip
            alone is larger than `max_gb`.

        Raises:
            ca3d.errors.UserError: It can't be written.
        """
        from ca3d.data.embedded.encode import write_video

        first, last = event.start - _MARGIN_SECONDS, event.end + _MARGIN_SECONDS
        pictures = [picture for seconds, picture in self._frames if first <= seconds <= last]
        if not pictures:
            return None
        video = np.stack(pictures)
        height, width = (side // 2 * 2 for side in video.shape[1:3])
        self._saved += 1
        when = time.strftime("%Y%m%d-%H%M%S")
        label = re.sub(r"[^\w-]+", "_", event.label)
        path = self.folder / f"ca3d-{when}-{os.getpid()}-{self._saved:04d}-{label}.avi"
        rate = Fraction(1 / self._period).limit_denominator(1000)

        def write(temporary: Path) -> None:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            write_video(temporary, video[:, :height, :width], rate, "mpeg4")

        try:
            write_atomically(path, write)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        return None if path in self.tidy() else path

    def tidy(self) -> list[Path]:
        """Deletes the clips that are too old or too many, oldest first.

        Returns:
            The files that were deleted.
        """
        self._next_tidy = time.monotonic() + _TIDY_SECONDS
        known = []
        for file in self.folder.iterdir():
            try:
                about = file.lstat()
            except FileNotFoundError:
                continue
            if not _OURS.fullmatch(file.name) or not stat.S_ISREG(about.st_mode):
                continue
            known.append((about.st_mtime, about.st_size, file))
        known.sort()
        total = sum(size for _, size, _ in known)
        oldest = -1.0 if self._keep_days is None else time.time() - 86400 * self._keep_days
        most = float("inf") if self._max_gb is None else 1e9 * self._max_gb
        deleted = []
        for changed, size, file in known:
            if changed >= oldest and total <= most:
                break
            file.unlink(missing_ok=True)
            total -= size
            deleted.append(file)
        return deleted
