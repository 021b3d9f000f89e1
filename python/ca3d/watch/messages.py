"""What the decoding process says: frames and notices, as plain bytes.

Nothing is unpickled: the process that reads foreign video is the one that may be broken into, and
its messages must not be able to run anything.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np

_HEAD = struct.Struct("<cI")
_FRAME = struct.Struct("<ddHH")
# No frame is larger, and no notice.
_MOST_BYTES = 64 << 20
NOTICES = ("opened", "resized", "gap", "damaged", "skipped", "alive", "end", "lost", "failed")


@dataclass(frozen=True)
class Frame:
    """A picture as the model sees it.

    Attributes:
        time: Seconds since the source's begin.
        clock: `time.monotonic()` when it was due or decoded.
        pixels: uint8 (H, W, 3) RGB.
    """

    time: float
    clock: float
    pixels: np.ndarray


@dataclass(frozen=True)
class Notice:
    """Anything but a picture.

    Attributes:
        kind: `opened`, `resized` (the frames' size), `gap`, `damaged` (packets so far), `skipped`
            (frames left undecoded so far), `alive`, or the last one: `end` (of a file), `lost` (a
            camera), `failed` (trying again is of no use).
        text: For the user.
        values: Numbers and strings.
    """

    kind: str
    text: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.kind in ("end", "lost", "failed")


def write_message(stream: BinaryIO, message: Frame | Notice) -> None:
    """Writes a message.

    Args:
        stream: A binary file.
        message: What to write.

    Example:
        >>> import io
        >>> stream = io.BytesIO()
        >>> write_message(stream, Notice("end", "done", {"frames": 3}))
        >>> write_message(stream, Frame(0.5, 7.0, np.zeros((2, 4, 3), dtype=np.uint8)))
        >>> _ = stream.seek(0)
        >>> notice, frame = read_messages(stream)
        >>> notice.values, frame.time, frame.pixels.shape
        ({'frames': 3}, 0.5, (2, 4, 3))
    """
    if isinstance(message, Frame):
        height, width, _ = message.pixels.shape
        body = _FRAME.pack(message.time, message.clock, height, width) + message.pixels.tobytes()
        stream.write(_HEAD.pack(b"F", len(body)) + body)
    else:
        body = json.dumps(asdict(message)).encode()
        stream.write(_HEAD.pack(b"N", len(body)) + body)
    stream.flush()


def read_messages(stream: BinaryIO) -> Iterator[Frame | Notice]:
    """Reads messages until the stream ends, also in the middle of one.

    Args:
        stream: A binary file.

    Raises:
        ValueError: What came is no message.
    """
    while len(head := stream.read(_HEAD.size)) == _HEAD.size:
        kind, length = _HEAD.unpack(head)
        if length > _MOST_BYTES:
            raise ValueError(f"the decoder sent a message of {length} bytes")
        body = stream.read(length)
        if len(body) < length:
            return
        yield _frame(body) if kind == b"F" else _notice(body)


def _frame(body: bytes) -> Frame:
    time, clock, height, width = _FRAME.unpack_from(body)
    pixels = np.frombuffer(body, dtype=np.uint8, offset=_FRAME.size)
    return Frame(time, clock, pixels.reshape(height, width, 3))


def _notice(body: bytes) -> Notice:
    content = json.loads(body)
    kind, text, values = content["kind"], content["text"], content["values"]
    if kind not in NOTICES or not isinstance(text, str) or not isinstance(values, dict):
        raise ValueError(f"the decoder sent a notice of kind {kind!r}")
    return Notice(kind, text, values)
