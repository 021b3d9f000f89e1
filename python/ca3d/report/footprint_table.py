"""The rows of `ca3d footprint` as text: two tables, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["as_text"]

# Table 3 of the paper: parameters in millions, "GFLOPs", and GB of memory in training (batch 20).
_PAPER = {
    "r3d_18": (33, 9.9, 7.4),
    "r2plus1d_18_15m": (15, 7.4, 11.6),
    "x3d_xl": (11, 11.9, 12.0),
    "stam_b": (119, 21.7, 11.8),
    "timesformer_b": (121, 16.9, 10.6),
    "tubevit_b": (86, 9.2, 5.0),
    "ca3d:pool=published": (7, 6.3, 4.6),
    "ca3d_l:pool=published": (19, 9.6, 6.1),
}
_NOTE = (
    "The paper's GFLOPs come from a hardware counter and are no FLOP count: they say 9.9 of R3D-18 "
    "(40.7 GMAC) and 11.9 of X3D-XL (4.8 GMAC). In honest MACs CA3D is not the lightest row: "
    "X3D-XL, Swin3D-T, I3D and ViViT-2 need fewer."
)
_TITLES = {
    "as shipped": "As shipped: every model as its library, or this package, has it",
    "same engine": (
        "Same engine: convolutional models channels-last, flat kernels as 2-D convolutions, "
        "normalised by ca3d_kernels and folded in inference where they follow a convolution"
    ),
}
_PARTS = ("weights", "gradients", "optimizer", "activations", "transient")


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as tables, one for each engine; no figure relates one precision to another.

    Args:
        rows: What `ca3d.footprint.footprint` returned.

    Returns:
        Lines of text.

    Example:
        >>> as_text([])
        'nothing was measured'
    """
    if not rows:
        return "nothing was measured"
    width = max(21, *(len(row["model"]) for row in rows))
    lines = []
    for engine, title in _TITLES.items():
        shown = [row for row in rows if row["engine"] in (engine, "both")]
        if shown:
            lines += [title, *_table(shown, width), ""]
    lines += ["Memory at the peak of a training step by kind (MB)", *_memory(rows, width), ""]
    first = rows[0]
    lines.append(
        f"batch {first['batch']}, clip {'x'.join(map(str, first['clip']))}, {first['device']}, "
        f"{first['threads']} threads; medians of interleaved rounds; inference is of one clip; "
        "a MAC is one multiply-add"
    )
    if any(row["model"] in _PAPER for row in rows):
        lines.append(_NOTE)
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]], width: int) -> list[str]:
    lines = [
        f"{'model':<{width}} {'precision':<17} {'parameters':>12} {'MACs':>8} {'2xMACs':>8} "
        f"{'train fr/s':>11} {'infer fr/s':>11} {'peak MB':>8}   "
        "paper: parameters, GFLOPs, memory at batch 20"
    ]
    for row in sorted(rows, key=lambda row: _order(rows, row)):
        paper = _PAPER.get(row["model"])
        lines.append(
            f"{row['model']:<{width}} {row['regime']:<17} {row['parameters']:>12,} "
            f"{row['macs'] / 1e9:>7.2f}G {row['two_macs'] / 1e9:>7.2f}G "
            f"{row['train_frames_per_second']:>11.1f} {row['infer_frames_per_second']:>11.1f} "
            f"{row['peak_train_bytes'] / 1e6:>8.0f}   "
            + ("-" if paper is None else f"{paper[0]}M, {paper[1]}, {paper[2]} GB")
        )
    return lines


def _order(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> int:
    """Precisions one after the other, in the order in which they were asked for."""
    return [other["regime"] for other in rows].index(row["regime"])


def _memory(rows: Sequence[dict[str, Any]], width: int) -> list[str]:
    lines = [
        f"{'model':<{width}} {'precision':<17} {'engine':<12}"
        + "".join(f" {part:>11}" for part in _PARTS)
    ]
    lines += [
        f"{row['model']:<{width}} {row['regime']:<17} {row['engine']:<12}"
        + "".join(f" {row['memory'][part] / 1e6:>11.0f}" for part in _PARTS)
        for row in rows
    ]
    return lines
