"""Time and memory of attention along time, for clips of 8 to 1024 frames."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ca3d.experiments.markdown import table
from ca3d.models.variants import PatternAttention
from ca3d_kernels import LocalTemporalAttention

__all__ = ["FRAMES", "attention_cost", "attention_report"]

FRAMES = (8, 16, 32, 64, 128, 256, 512, 1024)
CHANNELS, HEADS, WINDOW, PIXELS = 64, 4, 5, 16


def attention_cost(frames: Sequence[int] = FRAMES, rounds: int = 5) -> list[dict[str, Any]]:
    """Measures a forward and backward pass of local, full and masked attention.

    Args:
        frames: Numbers of frames.
        rounds: Timed rounds, in which the three take turns.

    Returns:
        A dictionary for each number of frames: frames, and for local, full and masked the bytes
        that the graph keeps and the median seconds. The projection is part of all three.

    Example:
        >>> row, = attention_cost([8], rounds=1)
        >>> sorted(row)[:3], row["local_bytes"] > 0
        (['frames', 'full_bytes', 'full_seconds'], True)
    """
    torch.manual_seed(0)
    local = LocalTemporalAttention(CHANNELS, HEADS, WINDOW)
    modules: dict[str, Callable[[Tensor], Tensor]] = {
        "local": local,
        "full": PatternAttention(local, "full"),
        "masked": PatternAttention(local, "local"),
    }
    rows = []
    for count in frames:
        x = torch.randn(1, CHANNELS, count, PIXELS, 1, requires_grad=True)
        row: dict[str, Any] = {"frames": count}
        times: dict[str, list[float]] = {name: [] for name in modules}
        for name, module in modules.items():
            row[f"{name}_bytes"] = _kept(module, x)
        for _ in range(rounds):
            for name, module in modules.items():
                began = time.perf_counter()
                module(x).sum().backward()
                times[name].append(time.perf_counter() - began)
        row |= {f"{name}_seconds": statistics.median(taken) for name, taken in times.items()}
        rows.append(row)
    return rows


def attention_report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The figures as Markdown: bytes, and times as ratios to the local kernel's.

    Args:
        rows: What `attention_cost` returned.

    Example:
        >>> attention_report([])
        ['Not run yet.']
    """
    if not rows:
        return ["Not run yet."]
    lines = [
        [
            row["frames"],
            *(f"{row[f'{name}_bytes'] / 1024:.0f}" for name in ("local", "full", "masked")),
            f"{1000 * row['local_seconds']:.2f}",
            *(f"{row[f'{n}_seconds'] / row['local_seconds']:.2f}" for n in ("full", "masked")),
        ]
        for row in rows
    ]
    return [
        f"One forward and backward pass, float32, {CHANNELS} channels, {HEADS} heads, {PIXELS}"
        f" pixels; local: this package's kernel with a window of {WINDOW}; full:"
        " scaled_dot_product_attention over all frames; masked: the same with the window as a mask."
        " Kept: what the graph holds until the backward pass. Times are medians of interleaved"
        " rounds; full and masked as ratios to local.",
        "",
        *table(
            [
                *("frames", "local kept, KiB", "full kept, KiB", "masked kept, KiB"),
                *("local, ms", "full / local", "masked / local"),
            ],
            lines,
        ),
    ]


def _kept(module: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of the distinct tensors that the graph keeps, the input left out."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != x.untyped_storage().data_ptr():
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(storages.values())
