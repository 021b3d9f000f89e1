"""Several clips of each recording, divided with and without regard to that."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ca3d.data.embedded.mocap import draw_clip, render_mocap
from ca3d.data.embedded.recipe import Recipe

__all__ = ["DIVISIONS", "divide", "recording_of", "recordings"]

#: "grouped": the clips of a recording are on one side; "random": over clips, as published.
DIVISIONS = ("grouped", "random")


def recordings(recipe: Recipe, clips: int, cuts: int) -> Iterator[tuple[np.ndarray, int, str]]:
    """Renders clips that come from the same recordings by threes, fours, ...

    A recording has one view, body, place and background, and one performance; its clips begin at
    different moments of it. So two of them are alike as two clips cut from one video are.

    Args:
        recipe: Of "mocap15" or "mocap30".
        clips: Number of clips; classes take turns.
        cuts: Clips of a recording.

    Yields:
        Frames (T, S, S, 3) uint8, label and name of the recording.

    Raises:
        ValueError: The recipe is of another data set.

    Example:
        >>> recipe = Recipe("mocap15", 48, 4, 16, 0.0, 0)
        >>> [name for _, label, name in recordings(recipe, 60, cuts=2) if label == 0]
        ['backflip-0', 'backflip-0', 'backflip-1', 'backflip-1']
    """
    if recipe.name not in ("mocap15", "mocap30"):
        raise ValueError(f"recordings are made of mocap15 or mocap30, not of {recipe.name!r}")
    for index in range(clips):
        label = recipe.label(index)
        recording, cut = divmod(index // len(recipe.classes), cuts)
        name = recording_of(recipe, index, cuts)
        seeds = [zlib.crc32(recipe.name.encode()), recipe.seed, label, recording]
        clip = draw_clip(
            np.random.default_rng(seeds),
            label,
            "train",
            recipe.size,
            recipe.clutter,
            recipe.name == "mocap30",
            recipe.views,
        )
        moved = (clip.phase + cut / cuts) % 1.0
        video = render_mocap(replace(clip, phase=moved), recipe.frames, recipe.frames_per_second)
        yield video, label, name


def recording_of(recipe: Recipe, index: int, cuts: int) -> str:
    """The name of a clip's recording.

    Args:
        recipe: As in `recordings`.
        index: Number of the clip.
        cuts: Clips of a recording.

    Example:
        >>> recording_of(Recipe("mocap15", 48, 4, 16, 0.0, 0), 31, cuts=2)
        'cartwheel-1'
    """
    classes = recipe.classes
    return f"{classes[recipe.label(index)]}-{index // len(classes) // cuts}"


def divide(
    groups: list[str], sizes: dict[str, int], division: str, seed: int = 100
) -> dict[str, list[int]]:
    """Divides clips into splits.

    Args:
        groups: The recording of each clip.
        sizes: Clips of each split, in order; together all clips.
        division: One of `DIVISIONS`. A grouped split has whole recordings, so that its size is met
            to within one recording.
        seed: Of the order.

    Returns:
        Places of the clips by split.

    Raises:
        ValueError: An unknown division, or sizes that don't sum to the number of clips.

    Example:
        >>> divide(["a", "a", "b", "b"], {"train": 2, "test": 2}, "grouped")
        {'train': [2, 3], 'test': [0, 1]}
    """
    if division not in DIVISIONS:
        raise ValueError(f"division must be one of {DIVISIONS}, got {division!r}")
    if sum(sizes.values()) != len(groups):
        raise ValueError(f"{len(groups)} clips can't be divided into {sizes}")
    rng = np.random.default_rng(seed)
    if division == "random":
        order = rng.permutation(len(groups)).tolist()
    else:
        names = sorted(set(groups))
        rank = {names[place]: i for i, place in enumerate(rng.permutation(len(names)))}
        order = sorted(range(len(groups)), key=lambda place: rank[groups[place]])
    parts: dict[str, list[int]] = {}
    begin = 0
    for name, size in sizes.items():
        end = begin + size
        if division == "grouped":
            while 0 < end < len(order) and groups[order[end]] == groups[order[end - 1]]:
                end += 1
        parts[name] = order[begin:end]
        begin = end
    return parts
