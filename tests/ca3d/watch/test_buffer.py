import threading

import numpy as np
import pytest

from ca3d.watch.buffer import FrameBuffer
from ca3d.watch.messages import Frame, Notice

PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)


def frame(number: int) -> Frame:
    return Frame(float(number), 0.0, PIXELS)


def test_a_slow_model_gets_rows_without_a_hole():
    """Three frames come while one is taken: what arrives are whole rows of the buffer's length."""
    buffer = FrameBuffer(capacity=8, drop=True)
    taken: list[float] = []
    rows = [1]
    for number in range(300):
        buffer.put(frame(number))
        if number % 3 == 0:
            item = buffer.get(timeout=0)
            if isinstance(item, Notice):
                assert item.kind == "gap"
                assert item.values["start"] == taken[-1]
                rows.append(0)
                item = buffer.get(timeout=0)
            assert isinstance(item, Frame)
            if rows[-1] > 1:
                assert item.time == taken[-1] + 1
            taken.append(item.time)
            rows[-1] += 1
    assert len(rows) > 5
    assert min(rows[:-1]) >= 8
    assert buffer.dropped > 100


def test_nothing_that_waits_is_older_than_the_buffer_is_long():
    buffer = FrameBuffer(capacity=4, drop=True)
    for number in range(100):
        buffer.put(frame(number))
    assert [buffer.get().time for _ in range(4)] == [0, 1, 2, 3]
    assert buffer.get(timeout=0) is None
    buffer.put(frame(100))
    gap, newest = buffer.get(), buffer.get()
    assert gap.values == {"start": 3.0, "seconds": 97.0, "dropped": 96}
    assert newest.time == 100


def test_without_dropping_the_reader_waits():
    buffer = FrameBuffer(capacity=2, drop=False)
    thread = threading.Thread(target=lambda: [buffer.put(frame(i)) for i in range(50)])
    thread.start()
    assert [buffer.get().time for _ in range(50)] == list(range(50))
    thread.join()
    assert buffer.dropped == 0


def test_notices_are_never_dropped():
    buffer = FrameBuffer(capacity=1, drop=True)
    for number in range(5):
        buffer.put(frame(number))
    buffer.put(Notice("end"))
    assert [buffer.get().time, buffer.get().kind] == [0, "end"]


def test_closing_lets_everybody_go():
    buffer = FrameBuffer(capacity=1, drop=False)
    buffer.put(frame(0))
    waiting = threading.Thread(target=buffer.put, args=(frame(1),))
    waiting.start()
    buffer.close()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_capacity():
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        FrameBuffer(0, drop=True)
