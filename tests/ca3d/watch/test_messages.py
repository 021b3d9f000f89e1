import io
import pickle
import struct

import numpy as np
import pytest

from ca3d.watch.messages import Frame, Notice, read_messages, write_message


def written(*messages):
    stream = io.BytesIO()
    for message in messages:
        write_message(stream, message)
    return stream.getvalue()


def test_they_survive():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    notice = Notice("lost", "gone: é", {"wait": 1.5})
    back = list(read_messages(io.BytesIO(written(Frame(1.5, 2.5, pixels), notice))))
    assert np.array_equal(back[0].pixels, pixels)
    assert (back[0].time, back[0].clock) == (1.5, 2.5)
    assert back[1] == notice


def test_a_torn_message_ends_the_stream():
    whole = written(Notice("alive"), Notice("end"))
    for cut in range(len(whole)):
        assert len(list(read_messages(io.BytesIO(whole[:cut])))) <= 1


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<cI", b"N", 1 << 31),
        struct.pack("<cI", b"N", 2) + b"{}",
        struct.pack("<cI", b"F", 20) + b"x" * 20,
        struct.pack("<cI", b"X", 3) + b"abc",
    ],
)
def test_rubbish_is_refused(data):
    with pytest.raises((ValueError, KeyError)):
        list(read_messages(io.BytesIO(data)))


def test_nothing_is_unpickled():
    body = pickle.dumps(Notice("end"))
    with pytest.raises(ValueError):  # noqa: PT011
        list(read_messages(io.BytesIO(struct.pack("<cI", b"N", len(body)) + body)))
