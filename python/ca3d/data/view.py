"""Which region of a frame a model sees: the centre, everything, or a rectangle of the user's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ca3d.errors import UserError

VIEWS = "letterbox, center, or 'roi X,Y,W,H'"


@dataclass(frozen=True)
class Cut:
    """How one frame becomes what a model sees, before the centre crop.

    Attributes:
        short_side: Shorter side to which the whole frame is scaled first; None keeps its size.
        box: (left, top, width, height) that is then cut out of it, or None for everything.
        scaled: (width, height) to which the cut is scaled, or None.
        pad: (left, top, right, bottom) black pixels around it.
    """

    short_side: int | None
    box: tuple[int, int, int, int] | None = None
    scaled: tuple[int, int] | None = None
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class View:
    """The region of a frame that a model sees.

    `center` is the middle square: the frame is scaled to its shorter side and cropped. `letterbox`
    is the whole frame with black bars that make it a square. `roi X,Y,W,H` is the middle square of
    a rectangle: left, top, width and height in pixels of the frame, or as shares of it when no
    number is above 1, which fit any size of frame.

    Attributes:
        kind: "center", "letterbox" or "roi".
        roi: The four numbers, or None.

    Example:
        >>> str(View.parse("roi:10,20,300,300")), str(View())
        ('roi 10,20,300,300', 'center')
        >>> View.parse("roi 0.5,0,0.5,1").region(640, 480)
        (320, 0, 320, 480)
    """

    kind: str = "center"
    roi: tuple[float, float, float, float] | None = None

    @classmethod
    def parse(cls, text: str) -> View:
        """Reads a view from its text.

        Args:
            text: "center", "letterbox" or "roi X,Y,W,H" (":" or "=" may stand for the blank).

        Raises:
            ca3d.errors.UserError: It is none of these.

        Example:
            >>> View.parse("wide")
            Traceback (most recent call last):
            ca3d.errors.UserError: --view must be letterbox, center, or 'roi X,Y,W,H', not 'wide'
        """
        text = text.strip()
        if text in ("center", "letterbox"):
            return cls(text)
        match = re.fullmatch(r"roi[ :=]\s*([^,]+),([^,]+),([^,]+),([^,]+)", text)
        if match is None:
            raise UserError(f"--view must be {VIEWS}, not {text!r}")
        try:
            left, top, width, height = (float(part) for part in match.groups())
        except ValueError:
            raise UserError(f"--view must be {VIEWS} with numbers, not {text!r}") from None
        roi = (left, top, width, height)
        if not all(map(math.isfinite, roi)) or min(left, top) < 0 or min(width, height) <= 0:
            raise UserError(
                f"--view {text!r}: X and Y must not be negative, W and H must be positive"
            )
        if max(roi) <= 1 and (left + width > 1 + 1e-9 or top + height > 1 + 1e-9):
            raise UserError(f"--view {text!r}: reaches beyond the frame (X + W and Y + H over 1)")
        if max(roi) > 1 and any(value != int(value) for value in roi):
            raise UserError(f"--view {text!r}: pixels must be whole numbers")
        return cls("roi", roi)

    def __str__(self) -> str:
        if self.roi is None:
            return self.kind
        return f"{self.kind} " + ",".join(f"{value:g}" for value in self.roi)

    @property
    def in_pixels(self) -> bool:
        """Whether the region is given in pixels, so that it belongs to one size of frame."""
        return self.roi is not None and max(self.roi) > 1

    def region(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Returns what the model sees as (left, top, width, height) in pixels of the frame.

        Args:
            width: Of an upright frame.
            height: Likewise.

        Raises:
            ca3d.errors.UserError: The rectangle reaches beyond the frame.

        Example:
            >>> View().region(640, 480), View("letterbox").region(640, 480)
            ((80, 0, 480, 480), (0, 0, 640, 480))
        """
        if self.kind == "letterbox":
            return 0, 0, width, height
        left, top, w, h = self._rectangle(width, height)
        side = min(w, h)
        if self.kind == "center":
            return left + (w - side) // 2, top + (h - side) // 2, side, side
        return left, top, w, h

    def cut(self, width: int, height: int, resize: int) -> Cut:
        """Plans how a frame is scaled and cut so that a centre crop of it is what the model sees.

        Args:
            width: Of an upright frame.
            height: Likewise.
            resize: Shorter side of the result in pixels (of the square, for `letterbox`).

        Raises:
            ca3d.errors.UserError: The rectangle reaches beyond the frame.

        Example:
            >>> View("letterbox").cut(640, 480, 112)
            Cut(short_side=84, box=None, scaled=None, pad=(0, 14, 0, 14))
            >>> View.parse("roi 0,0,224,448").cut(640, 480, 112)
            Cut(short_side=240, box=(0, 0, 112, 224), scaled=None, pad=(0, 0, 0, 0))
        """
        if self.kind == "center":
            return Cut(resize)
        if self.kind == "letterbox":
            short = max(1, resize * min(width, height) // max(width, height))
            w, h = short_side_size(width, height, short)
            # A frame of extreme shape stays longer than the square: the centre crop cuts it.
            x, y = max(0, resize - w), max(0, resize - h)
            return Cut(short, None, None, (x // 2, y // 2, x - x // 2, y - y // 2))
        left, top, w, h = self._rectangle(width, height)
        factor = resize / min(w, h)
        if factor >= 1:
            # Enlarging the whole frame for the sake of a small part would take a lot of memory.
            return Cut(None, (left, top, w, h), short_side_size(w, h, resize))
        short = math.ceil(min(width, height) * factor)
        full_w, full_h = short_side_size(width, height, short)
        w, h = min(round(w * factor), full_w), min(round(h * factor), full_h)
        x, y = round(left * full_w / width), round(top * full_h / height)
        return Cut(short, (min(x, full_w - w), min(y, full_h - h), w, h))

    def _rectangle(self, width: int, height: int) -> tuple[int, int, int, int]:
        if self.roi is None:
            return 0, 0, width, height
        left, top, w, h = self.roi
        if not self.in_pixels:
            left, w, top, h = left * width, w * width, top * height, h * height
        x, y = round(left), round(top)
        w, h = max(1, round(w)), max(1, round(h))
        if self.in_pixels and (x + w > width or y + h > height):
            raise UserError(f"--view '{self}' reaches beyond the frame of {width}x{height} pixels")
        return min(x, width - 1), min(y, height - 1), min(w, width - x), min(h, height - y)


def short_side_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Returns (width, height) after resizing the shorter side, the other side rounded down.

    Example:
        >>> short_side_size(320, 240, 112)
        (149, 112)
    """
    if short_side is None:
        return width, height
    if width <= height:
        return short_side, max(1, short_side * height // width)
    return max(1, short_side * width // height), short_side
