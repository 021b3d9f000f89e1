"""The published protocol: its split, its frames, its augmentation."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_folders import make_hmdb51, make_kinetics400, make_ucf101
from torchvision.transforms import v2

from ca3d.data.benchmarks import partition
from ca3d.data.sampling import ClipSpec
from ca3d.data.split_options import SplitOptions
from ca3d.data.splits import overlaps
from ca3d.data.transforms import training_transform
from ca3d.errors import UserError
from ca3d.training import TrainConfig

PUBLISHED = SplitOptions(protocol="published")


@pytest.mark.parametrize("make", [make_ucf101, make_hmdb51])
def test_split_is_pythons_shuffle_of_the_sorted_list(make: object, tmp_path: Path) -> None:
    videos = make(tmp_path)  # type: ignore[operator]
    found = partition(videos, PUBLISHED)
    assert found is not None
    files = sorted(str(p.relative_to(videos)) for p in videos.rglob("*.avi"))
    random.seed(100)
    order = list(range(len(files)))
    random.shuffle(order)
    first, second = int(0.70 * len(files)), int(0.15 * len(files))
    expected = {
        "train": order[:first],
        "val": order[first : first + second],
        "test": order[first + second :],
    }
    for name, places in expected.items():
        assert [str(s.path.relative_to(videos)) for s in found.splits[name]] == [
            files[i] for i in places
        ]
    # The leak that the protocol has, and that `ca3d data check` reports.
    assert {o.kind for o in overlaps(found.splits)} == {"group"}
    assert found.protocol.name == "published"
    assert found.protocol.seed == 100


def test_lists_of_kinetics_are_taken_as_they_are(tmp_path: Path) -> None:
    root = make_kinetics400(tmp_path / "k400")
    by_lists = partition(root, PUBLISHED)
    for split in ("train", "val", "test"):
        (root / f"{split}.csv").unlink()
    by_folders = partition(root, SplitOptions(protocol="published", dataset="kinetics400"))
    assert by_lists is not None
    assert by_folders is not None
    for name, part in by_lists.splits.items():
        assert {s.path for s in part} == {s.path for s in by_folders.splits[name]}


def test_any_folder(tmp_path: Path, dataset: Path) -> None:
    found = partition(dataset, PUBLISHED)
    assert found is not None
    assert {name: len(part) for name, part in found.splits.items()} == {
        "train": 8,
        "val": 1,
        "test": 3,
    }
    (tmp_path / "few" / "a").mkdir(parents=True)
    (tmp_path / "few" / "a" / "1.avi").touch()
    with pytest.raises(UserError, match="too few videos for a published train split"):
        partition(tmp_path / "few", PUBLISHED)


@pytest.mark.parametrize("frames", [300, 41, 40, 39, 25, 7, 1])
def test_frames_are_read_as_published(frames: int) -> None:
    """20 frames at step 2 (from frame 0 to the end where there are fewer), 16 in a row of them."""

    def published(start: int, offset: int) -> list[int]:
        read = list(range(start, start + 40, 2))
        if frames < start + 40:
            read = list(range(0, frames, 2))
        return [read[(offset + i) % len(read)] for i in range(16)]

    clip = ClipSpec(16, 2, window=20)
    start = max(0, (frames - 40) // 2)
    held = min(20, len(range(0, frames, 2)))
    center = published(start, max(0, held - 16) // 2)
    assert clip.sample(frames, 25.0)[0].tolist() == center
    rng = np.random.default_rng(0)
    drawn = {tuple(clip.sample(frames, 25.0, rng, "random")[0].tolist()) for _ in range(2000)}
    possible = {
        tuple(published(s, o))
        for s in range(max(0, frames - 40) + 1)
        for o in range(max(0, held - 16) + 1)
    }
    assert drawn <= possible
    if len(possible) < 100:
        assert drawn == possible


def test_augmentation_is_the_published_one() -> None:
    steps = training_transform(112, 112).transforms
    flip, resize, rotate, crop, center = steps
    assert isinstance(flip, v2.RandomHorizontalFlip)
    assert flip.p == 0.5
    assert [step.p for step in (resize, rotate, crop)] == [0.3, 0.3, 0.5]
    assert isinstance(center, v2.CenterCrop)
    assert tuple(center.size) == (112, 112)
    rotation = rotate.transforms[0]
    assert rotation.degrees == [-10.0, 10.0]
    assert rotation.expand
    assert v2.InterpolationMode(rotation.interpolation) == v2.InterpolationMode.NEAREST
    assert tuple(crop.transforms[0].size) == (140, 140)
    assert tuple(crop.transforms[1].size) == (112, 112)
    torch.manual_seed(0)
    clip = torch.zeros(1, 3, 112, 150, dtype=torch.uint8)
    sides = {min(resize.transforms[0](clip).shape[-2:]) for _ in range(1500)}
    assert sides == set(range(89, 141))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "x"}, "--group x: --protocol published draws its own split"),
        ({"fps": 25.0}, "counts the frames of the video"),
        ({"val_fraction": 0.2}, "--val-fraction 0.2: --protocol published has shares of 70/15/15"),
        ({"split_seed": 3}, "--split-seed 3: --protocol published has seed 100"),
    ],
)
def test_what_the_protocol_fixes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(data="x", out="y", protocol="published", **options).validate()  # type: ignore[arg-type]
