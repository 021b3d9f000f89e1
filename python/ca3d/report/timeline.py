"""A video's frames above the timeline of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ca3d.data.reader import open_video
from ca3d.training.plots import INK, new_figure, save_figure

if TYPE_CHECKING:
    from ca3d.predict import Prediction

COLORS = ("#2563a8", "#d9772b", "#3f9c5a", "#b5478b", "#7a6bc2", "#8a8f98")


def draw_timeline(
    prediction: Prediction,
    path: Path,
    frames: int = 10,
    truth: Sequence[tuple[float, float, str]] = (),
) -> None:
    """Draws frames of a video above the probabilities of its likeliest classes over time.

    Args:
        prediction: What a model made of the video; its file must still be there.
        path: The PNG to write.
        frames: Number of frames to show.
        truth: What is really seen, as (begin, end, label) in seconds, to be written below the
            frames.

    Raises:
        ca3d.errors.UserError: The video can't be read or the picture can't be written.
    """
    with open_video(prediction.path) as video:
        places = np.linspace(0, video.num_frames - 1, frames).round().astype(int)
        pictures = video.frames(places.tolist(), short_side=160).permute(0, 2, 3, 1).numpy()
    strip = np.concatenate(list(pictures), axis=1)
    width = 12.0
    height = width * strip.shape[0] / strip.shape[1]
    figure = new_figure(width, height + 2.3 + 0.3 * bool(truth))
    top, bottom = figure.subplots(2, 1, height_ratios=[height, 2.0])
    top.imshow(strip, extent=(0, prediction.duration, 0, 1), aspect="auto")
    top.set_yticks([])
    top.set_xticks([])
    title = prediction.path.name
    if not truth:
        best = prediction.labels[0]
        title += f": {best.name} {100 * best.probability:.0f} %"
    top.set_title(title, color=INK, fontsize=12, loc="left")
    for begin, end, label in truth:
        top.axvline(end, color="white", linewidth=3)
        top.text((begin + end) / 2, -0.08, label, ha="center", va="top", fontsize=10, color=INK)
    _draw_bars(bottom, prediction)
    save_figure(figure, path, dpi=110)


def _draw_bars(axes: Any, prediction: Prediction) -> None:
    """Stacks the windows' probabilities of the classes that lead anywhere, as coloured bars."""
    probabilities = prediction.probabilities.numpy()
    importance = probabilities.max(0) + 1e-3 * probabilities.mean(0)
    shown = [int(i) for i in importance.argsort()[::-1][: len(COLORS) - 1]]
    # Windows overlap: each is drawn up to the middle of its neighbours' centres.
    centers = np.array([(w.start + w.end) / 2 for w in prediction.windows])
    edges = np.concatenate([[0.0], (centers[1:] + centers[:-1]) / 2, [prediction.duration]])
    widths, lefts = np.diff(edges), edges[:-1]
    floor = np.zeros(len(centers))
    for place, index in enumerate(shown):
        values = probabilities[:, index]
        axes.bar(
            lefts,
            values,
            widths,
            bottom=floor,
            align="edge",
            color=COLORS[place],
            label=prediction.classes[index],
            edgecolor="white",
            linewidth=0.6,
        )
        floor += values
    others = np.maximum(1 - floor, 0)
    axes.bar(lefts, others, widths, bottom=floor, align="edge", color="#e8eaed", label="others")
    axes.set_xlim(0, prediction.duration)
    axes.set_ylim(0, 1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("probability")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
