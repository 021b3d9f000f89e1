"""Curves and confusion matrices as PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ca3d.training.checkpoint import write_file
from ca3d.training.logs import Row

INK = "#1f2933"
BLUE = "#2563a8"
ORANGE = "#d9772b"


def new_figure(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure of so many inches that needs no display.

    Example:
        >>> new_figure(4, 3).get_size_inches().tolist()
        [4.0, 3.0]
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Writes a figure as PNG, atomically.

    Args:
        figure: A matplotlib figure.
        path: Where to.
        dpi: Pixels an inch.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(new_figure(2, 1), Path(folder, "a.png"))
        ...     Path(folder, "a.png").read_bytes()[1:4]
        b'PNG'
    """
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # Names in a script that the font doesn't have are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(picture, format="png", dpi=dpi)
    write_file(path, picture.getvalue())


def plot_curves(rows: list[Row], path: Path, title: str = "", chance: float | None = None) -> None:
    """Draws loss, accuracy and learning rate over the epochs.

    Args:
        rows: Rows of the metrics log.
        path: The PNG to write.
        title: Stands above the curves.
        chance: Accuracy of guessing, drawn as a dotted line.

    Example:
        >>> import tempfile
        >>> row = {"epoch": 0, "train_loss": 1.0, "train_accuracy": 0.5, "lr": 0.1, "val_count": 0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_curves([row], Path(folder, "curves.png"))
    """
    figure = new_figure(10, 3.4)
    figure.suptitle(title, color=INK, fontsize=11)
    epochs = [row["epoch"] + 1 for row in rows]
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=[1, 1, 0.7])
    marker = "o" if len(rows) < 30 else None
    style: dict[str, Any] = {"marker": marker, "markersize": 3, "linewidth": 1.6}
    for axes, key, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        axes.plot(
            epochs,
            [factor * r[f"train_{key}"] for r in rows],
            color=BLUE,
            label="training",
            **style,
        )
        if rows[0].get("val_count"):
            values = [factor * r[f"val_{key}"] for r in rows]
            axes.plot(epochs, values, color=ORANGE, label="validation", **style)
    if chance is not None:
        accuracy.axhline(100 * chance, color="#888888", linestyle=":", linewidth=1, label="chance")
    rate.plot(epochs, [row["lr"] for row in rows], color=INK, **style)
    loss.set_ylabel("cross-entropy")
    loss.set_ylim(bottom=0)
    accuracy.set_ylabel("top-1 accuracy (%)")
    accuracy.set_ylim(0, 100)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    accuracy.legend(frameon=False, fontsize=8)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def plot_confusion(confusion: Tensor, classes: Sequence[str], path: Path, title: str = "") -> None:
    """Draws a confusion matrix; each row is scaled to shares of its class.

    Args:
        confusion: (classes, classes) int64, counts of [true, predicted].
        classes: Names in the order of the matrix.
        path: The PNG to write.
        title: Stands above the matrix.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_confusion(torch.eye(2).long(), ["run", "walk"], Path(folder, "a.png"))
    """
    counts = confusion.numpy().astype(np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = len(classes)
    inches = min(max(4.5, 1.6 + 0.26 * size), 18)
    figure = new_figure(inches + 0.8, inches)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11, color=INK)
    if size <= 60:
        axes.set_xticks(range(size), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(size), classes, fontsize=7)
    if size <= 35:
        for row in range(size):
            for column in range(size):
                if counts[row, column]:
                    color = "white" if shares[row, column] > 0.55 else INK
                    text = f"{100 * shares[row, column]:.0f}"
                    axes.text(
                        column, row, text, ha="center", va="center", fontsize=5.5, color=color
                    )
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    bar.set_label("share of the true class", fontsize=8)
    save_figure(figure, path)
