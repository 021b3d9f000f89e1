"""Between the camera, which does not wait, and the model, which takes its time."""

from __future__ import annotations

import threading
from collections import deque

from ca3d.watch.messages import Frame, Notice


class FrameBuffer:
    """A bounded queue of frames and notices in which frames of a camera never grow old.

    With `drop`, a frame that finds the queue full is dropped, and so are all that follow until the
    queue is empty: the model then gets a row of frames without a hole, long enough for a window,
    where dropping one frame here and one there would leave it none. A notice of kind `gap` stands
    for the dropped ones. Without `drop`, who brings frames waits.

    Args:
        capacity: Most frames to hold.
        drop: Whether to drop frames rather than to wait.

    Attributes:
        dropped: Frames dropped so far.

    Example:
        >>> import numpy as np
        >>> buffer = FrameBuffer(capacity=2, drop=True)
        >>> pixels = np.zeros((1, 1, 3), dtype=np.uint8)
        >>> for time in range(4):
        ...     buffer.put(Frame(time, 0.0, pixels))
        >>> [buffer.get().time, buffer.get().time], buffer.dropped
        ([0, 1], 2)
    """

    def __init__(self, capacity: int, drop: bool) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity, self.drop = capacity, drop
        self.dropped = 0
        self._items: deque[Frame | Notice] = deque()
        self._frames = 0
        self._newest = 0.0
        self._hole = 0
        self._dropping = False
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: Frame | Notice) -> None:
        """Adds a frame or a notice; notices are never dropped.

        Args:
            item: What comes next.
        """
        with self._changed:
            if isinstance(item, Frame) and not self._admit(item):
                return
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Frame | Notice | None:
        """Takes the oldest item.

        Args:
            timeout: Seconds to wait for one; None for ever.

        Returns:
            The item, or None when none came in time or the buffer is closed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout):
                return None
            if not self._items:
                return None
            item = self._items.popleft()
            if isinstance(item, Frame):
                self._frames -= 1
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Lets go of everybody who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _admit(self, frame: Frame) -> bool:
        if not self.drop:
            self._changed.wait_for(lambda: self._frames < self.capacity or self._closed)
            self._frames += 1
            return True
        if self._dropping and self._frames == 0:
            self._dropping = False
            values = {"start": self._newest, "seconds": frame.time - self._newest}
            self._items.append(Notice("gap", values={**values, "dropped": self._hole}))
            self._hole = 0
        elif self._frames >= self.capacity:
            self._dropping = True
        if self._dropping:
            self.dropped += 1
            self._hole += 1
            return False
        self._frames += 1
        self._newest = frame.time
        return True
