"""Clips in memory: what they show, what the controls take away, how they are divided."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ca3d.data.embedded.recipe import Recipe
from ca3d.errors import UserError
from ca3d.experiments.clips import ClipSet, load
from ca3d.experiments.recordings import divide, recordings
from ca3d.training.loader import load_batches

DATA = {"name": "motion-order", "train": 16, "val": 8, "test": 8, "frames": 8, "size": 16}


def test_clips_are_those_of_the_data_set(tmp_path: Path) -> None:
    data = load(DATA, tmp_path)
    video = Recipe("motion-order", 32, 16, 16, 0.0, 0).render("test", 3)[0][::2]
    mean = video.reshape(8, 16, 2, 16, 2, 3).mean((2, 4)).transpose(3, 0, 1, 2)
    stored = data.test.clips[3].numpy()  # type: ignore[union-attr]
    assert np.abs(stored - mean).max() <= 0.5
    clip, label, index = data.test[3]  # type: ignore[index, misc]
    assert (label, index) == (3, 3)
    back = clip * torch.tensor(data.std).view(3, 1, 1, 1) + torch.tensor(data.mean).view(3, 1, 1, 1)
    torch.testing.assert_close(back * 255, torch.from_numpy(stored).float(), atol=1e-3, rtol=0)
    batch = next(load_batches(data.train, [[0, 5, 7]]))
    assert batch.labels.tolist() == [0, 5, 7]


def test_clips_are_rendered_once(tmp_path: Path) -> None:
    load(DATA, tmp_path)
    said: list[str] = []
    load({**DATA, "control": "frames"}, tmp_path, say=said.append)
    assert said == []
    assert len(list(tmp_path.glob("*.npz"))) == 1
    load({**DATA, "seed": 1}, tmp_path, say=said.append)
    assert said == ["rendering 32 clips of motion-order, 8x16x16"]


def _set(control: str | None, training: bool = True) -> ClipSet:
    clips = torch.arange(8, dtype=torch.uint8).view(1, 1, 8, 1, 1).expand(4, 3, 8, 2, 2)
    std = (1 / 255,) * 3
    return ClipSet(
        clips, [0, 1, 0, 1], ["a", "b"], mean=(0,) * 3, std=std, control=control, training=training
    )


def _frames(data: ClipSet, index: int) -> list[int]:
    return data[index][0][0, :, 0, 0].round().int().tolist()


def test_frames_control_leaves_no_motion() -> None:
    data = _set("frames")
    seen = set()
    for epoch in range(30):
        data.set_epoch(epoch)
        shown = _frames(data, 2)
        assert len(set(shown)) == 1
        seen.add(shown[0])
    assert len(seen) > 4
    fixed = _set("frames", training=False)
    assert _frames(fixed, 0) == _frames(fixed, 1) == [4] * 8


def test_shuffled_control_leaves_no_order() -> None:
    data = _set("shuffled")
    orders = set()
    for epoch in range(10):
        data.set_epoch(epoch)
        shown = _frames(data, 2)
        assert sorted(shown) == list(range(8))
        orders.add(tuple(shown))
    assert len(orders) == 10
    data.set_epoch(3)
    again = _set("shuffled")
    again.set_epoch(3)
    assert _frames(data, 1) == _frames(again, 1)
    fixed = _set("shuffled", training=False)
    assert _frames(fixed, 0) == _frames(fixed, 0) != _frames(fixed, 1)


def test_recordings_are_alike_in_looks_only() -> None:
    recipe = Recipe("mocap15", 32, 8, 16, 0.0, 0)
    clips = {}
    for video, label, name in recordings(recipe, 60, cuts=2):
        clips.setdefault(name, []).append((video.astype(float), label))
    assert {len(found) for found in clips.values()} == {2}
    background = {
        name: [v[:, :3].mean((0, 1, 2)) for v, _ in found] for name, found in clips.items()
    }
    same = [np.abs(a - b).max() for a, b in background.values()]
    other = [
        np.abs(background["walk-0"][0] - b[0]).max() for n, b in background.items() if n != "walk-0"
    ]
    assert np.mean(same) < 0.3 * np.mean(other)
    assert all(np.abs(a[0] - b[0]).max() > 10 for a, b in clips.values())


def test_grouped_division_keeps_recordings_together(tmp_path: Path) -> None:
    groups = [f"r{i // 4}" for i in range(80)]
    sizes = {"train": 50, "val": 14, "test": 16}
    grouped = divide(groups, sizes, "grouped")
    random = divide(groups, sizes, "random")
    for parts in (grouped, random):
        assert sorted(i for part in parts.values() for i in part) == list(range(80))
    sides = Counter(
        sum(any(groups[i] == g for i in part) for part in grouped.values()) for g in set(groups)
    )
    assert set(sides) == {1}
    shared = {groups[i] for i in random["train"]} & {groups[i] for i in random["test"]}
    assert len(shared) > 5
    data = load(
        {"name": "mocap15", "train": 60, "val": 30, "test": 30, "division": "grouped", "cuts": 2},
        tmp_path,
    )
    assert data.test is not None
    names = [{s.group for s in part.samples} for part in (data.train, data.test)]
    assert not names[0] & names[1]
    for sample, label in zip(data.test.samples, data.test.labels, strict=True):  # type: ignore[attr-defined]
        assert str(sample.group).startswith(data.classes[label])


def test_bad_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'ucf101' is not rendered here"):
        load({"name": "ucf101"}, tmp_path)
    with pytest.raises(UserError, match="'color' is nothing that clips of mocap30 have"):
        load({"name": "mocap30", "color": 1}, tmp_path)
    with pytest.raises(ValueError, match="control must be one of"):
        _set("still")
    with pytest.raises(ValueError, match="division must be one of"):
        divide(["a"], {"train": 1}, "by hand")
