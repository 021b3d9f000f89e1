import shutil

import numpy as np
import pytest
import torch

from ca3d.data.folder import VideoFolder
from ca3d.data.sampling import ClipSpec
from ca3d.data.statistics import measure
from ca3d.errors import UserError

CLIP = ClipSpec(frames=4, stride=2, size=32, resize=36)


@pytest.fixture
def root(tmp_path, write_video):
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for i in range(3):
            level = rng.integers(40, 200, size=3)
            noise = rng.integers(-30, 30, size=(12, 48, 64, 3))
            images = list((level + noise).clip(0, 255).astype(np.uint8))
            write_video(tmp_path / label / f"{i}.mkv", images, codec="ffv1", pix_fmt="bgr0")
    return tmp_path


def test_definition(root):
    data = VideoFolder(root, clip=CLIP, training=True, mean=(9, 9, 9), std=(7, 7, 7))
    mean, std = measure(data)
    clips = VideoFolder(root, clip=CLIP, training=False)
    pixels = torch.stack([clips[i][0] for i in range(6)]).double().movedim(1, 0).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-6)


def test_normalised_clips_have_mean_0_and_deviation_1(root):
    data = VideoFolder(root, clip=CLIP, training=False)
    data.set_statistics(*measure(data))
    pixels = torch.stack([data[i][0] for i in range(6)]).double().movedim(1, 0).flatten(1)
    assert pixels.mean(1).abs().max() < 1e-5
    assert (pixels.std(1, correction=0) - 1).abs().max() < 1e-5


def test_colour_order(root):
    rgb = measure(VideoFolder(root, clip=CLIP, training=False))
    bgr = measure(VideoFolder(root, clip=CLIP, training=False, color="bgr"))
    assert bgr == (rgb[0][::-1], rgb[1][::-1])
    assert len(set(rgb[0])) == 3


def test_workers_change_nothing(root):
    data = VideoFolder(root, clip=CLIP, training=False)
    seen = []
    assert measure(data, workers=2, progress=lambda *now: seen.append(now)) == measure(data)
    assert seen == [(i, 6) for i in range(1, 7)]


def test_limit(root):
    data = VideoFolder(root, clip=CLIP, training=False)
    seen = []
    assert measure(data, limit=2, progress=lambda *now: seen.append(now)) != measure(data)
    assert len(seen) == 2
    with pytest.raises(ValueError, match="limit"):
        measure(data, limit=0)


def test_broken_videos_are_left_out(root):
    data = VideoFolder(root, clip=CLIP, training=False)
    whole = measure(data)
    data.samples[0].path.write_bytes(b"")
    assert measure(data) != whole
    assert list(data.broken) == [data.samples[0].path]
    for sample in data.samples:
        sample.path.write_bytes(b"")
    with pytest.raises(UserError, match="no video can be read"):
        measure(data)


def test_one_colour_does_not_divide_by_zero(root, write_video):
    shutil.rmtree(root / "a")
    shutil.rmtree(root / "b")
    for label in ("a", "b"):
        image = np.full((48, 64, 3), 51, dtype=np.uint8)
        write_video(root / label / "0.mkv", [image] * 9, codec="ffv1", pix_fmt="bgr0")
    data = VideoFolder(root, clip=CLIP, training=False)
    assert measure(data) == ((0.2,) * 3, (1.0,) * 3)
