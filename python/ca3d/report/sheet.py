"""A contact sheet: strips of frames of many videos, each with what was recognised in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ca3d.data.reader import open_video
from ca3d.training.plots import INK, new_figure, save_figure

GREEN = "#2e8b57"
RED = "#c0392b"


@dataclass(frozen=True)
class Strip:
    """One video of a contact sheet.

    Args:
        path: The video.
        label: Its true class.
        predicted: The class that the model gave.
        probability: The model's probability of that class.

    Example:
        >>> Strip(Path("a.avi"), "walk", "run", 0.5).right
        False
    """

    path: Path
    label: str
    predicted: str
    probability: float

    @property
    def right(self) -> bool:
        """Whether the model was right."""
        return self.label == self.predicted


def draw_contact_sheet(
    strips: Sequence[Strip], path: Path, columns: int = 2, frames: int = 7, title: str = ""
) -> None:
    """Draws videos as strips of frames, framed green where the model was right, else red.

    Args:
        strips: The videos, row by row.
        path: The PNG to write.
        columns: Strips in a row.
        frames: Frames in a strip, evenly over the video.
        title: Stands above the sheet.

    Raises:
        ca3d.errors.UserError: A video can't be read or the picture can't be written.

    Example:
        >>> import tempfile
        >>> strips = [Strip(Path(video_file), "walk", "run", 0.5)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_contact_sheet(strips, Path(folder, "sheet.png"))
    """
    rows = -(-len(strips) // columns)
    pictures = [_strip(strip.path, frames) for strip in strips]
    ratio = pictures[0].shape[0] / pictures[0].shape[1]
    width = 6.3 * columns
    height = rows * (width / columns * ratio + 0.27) + 0.5
    figure = new_figure(width, height)
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_xticks([])
        axes.set_yticks([])
        if place >= len(strips):
            axes.axis("off")
            continue
        strip = strips[place]
        color = GREEN if strip.right else RED
        axes.imshow(pictures[place], interpolation="lanczos")
        for spine in axes.spines.values():
            spine.set_color(color)
            spine.set_linewidth(2)
        if strip.right:
            text = f"{strip.label}  ✓ {100 * strip.probability:.0f} %"
        else:
            text = f"{strip.label}  ✗ {strip.predicted} {100 * strip.probability:.0f} %"
        axes.set_title(text, fontsize=8.5, color=color, loc="left", pad=3)
    save_figure(figure, path, dpi=110)


def _strip(path: Path, frames: int) -> np.ndarray:
    """Returns (height, frames · width, 3) uint8."""
    with open_video(path) as video:
        places = np.linspace(0, video.num_frames - 1, frames).round().astype(int)
        pictures = video.frames(places.tolist(), short_side=96).permute(0, 2, 3, 1).numpy()
    # A white line between the frames.
    pictures = np.pad(pictures, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return np.concatenate(list(pictures), axis=1)
