import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ca3d.data.folder import VideoFolder, collate
from ca3d.data.reader import open_video
from ca3d.data.samples import find_samples, write_list
from ca3d.data.sampling import ClipSpec
from ca3d.data.transforms import Normalize, evaluation_crops
from ca3d.errors import UserError

CLIP = ClipSpec(frames=4, stride=2, size=32, resize=36)


@pytest.fixture
def root(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "videos"))


def broken_file(root: Path) -> Path:
    path = root / "walk" / "p1_t0.avi"
    path.write_bytes(path.read_bytes()[:200])
    return path


def load(data: VideoFolder, workers: int, order=None) -> list:
    loader = DataLoader(
        data, batch_size=3, num_workers=workers, collate_fn=collate, sampler=order,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return [(clips, labels.tolist(), indices.tolist()) for clips, labels, indices in loader]


class TestItems:
    def test_training_item(self, dataset):
        data = VideoFolder(dataset, clip=CLIP, training=True)
        assert len(data) == 12
        assert data.classes == ["jump", "walk"]
        assert data.class_counts() == [6, 6]
        clip, label, index = data[7]
        assert clip.shape == (3, 4, 32, 32)
        assert clip.dtype == torch.float32
        assert (label, index) == (1, 7)
        assert 0 <= clip.min() <= clip.max() <= 1

    def test_evaluation_is_the_centre_clip(self, dataset):
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
        data = VideoFolder(dataset, clip=CLIP, training=False, mean=mean, std=std, color="bgr")
        with open_video(data.samples[3].path) as video:
            start = (video.num_frames - 8) // 2
            frames = video.frames(range(start, start + 8, 2), short_side=36)
        expected = Normalize(mean, std, "bgr")(evaluation_crops(frames, 32)[0])
        assert torch.equal(data[3][0], expected)

    def test_testing_views(self, dataset):
        data = VideoFolder(dataset, clip=CLIP, training=False, clips=5, crops=3)
        views = data[0][0]
        assert views.shape == (15, 3, 4, 32, 32)
        single = VideoFolder(dataset, clip=CLIP, training=False)[0][0]
        # The third of five clips is the centre one, and its second crop the centre crop.
        assert torch.equal(views[2 * 3 + 1], single)

    def test_indexing(self, dataset):
        data = VideoFolder(dataset, clip=CLIP, training=False)
        assert data[-1][2] == 11
        with pytest.raises(IndexError, match="12"):
            data[12]


class TestRandomness:
    def test_seed_epoch_and_index_decide(self, dataset):
        def clip(seed: int, epoch: int, index: int) -> torch.Tensor:
            data = VideoFolder(dataset, clip=CLIP, training=True, seed=seed)
            data.set_epoch(epoch)
            return data[index][0]

        reference = clip(1, 2, 3)
        torch.manual_seed(99)
        np.random.seed(99)
        assert torch.equal(reference, clip(1, 2, 3))
        # Twenty other seeds and epochs: all alike is out of the question.
        assert any(not torch.equal(reference, clip(s, 2, 3)) for s in range(10, 20))
        assert any(not torch.equal(reference, clip(1, e, 3)) for e in range(10, 20))

    def test_torchs_own_generator_is_left_alone(self, dataset):
        data = VideoFolder(dataset, clip=CLIP, training=True)
        before = torch.get_rng_state()
        data[0]
        assert torch.equal(before, torch.get_rng_state())

    def test_any_number_of_workers(self, dataset):
        data = VideoFolder(dataset, clip=CLIP, training=True, seed=5)
        batches = {workers: load(data, workers) for workers in (0, 1, 2)}
        for workers in (1, 2):
            for mine, other in zip(batches[0], batches[workers], strict=True):
                assert torch.equal(mine[0], other[0])
                assert mine[1:] == other[1:]

    def test_resume_in_the_middle_of_an_epoch(self, dataset):
        data = VideoFolder(dataset, clip=CLIP, training=True, seed=5)
        data.set_epoch(4)
        order = [5, 2, 9, 11, 0, 7]
        whole = load(data, 0, order)
        again = VideoFolder(dataset, clip=CLIP, training=True, seed=5)
        again.set_epoch(4)
        assert torch.equal(whole[1][0], load(again, 0, order[3:])[0][0])

    def test_running_workers_see_the_new_epoch(self, dataset):
        data = VideoFolder(dataset, clip=CLIP, training=True)
        loader = DataLoader(data, batch_size=12, num_workers=1, persistent_workers=True)
        first = next(iter(loader))[0]
        data.set_epoch(1)
        second = next(iter(loader))[0]
        assert not torch.equal(first, second)
        fresh = VideoFolder(dataset, clip=CLIP, training=True)
        fresh.set_epoch(1)
        assert torch.equal(second, torch.stack([fresh[i][0] for i in range(12)]))


class TestBrokenFiles:
    def test_training_goes_on_with_another_video(self, root, caplog):
        path = broken_file(root)
        data = VideoFolder(root, clip=CLIP, training=True)
        index = [s.path for s in data.samples].index(path)
        with caplog.at_level(logging.WARNING, "ca3d.data"):
            clip, label, used = data[index]
            again = data[index]
        assert used != index
        assert label == data.labels[used]
        assert (again[1], again[2]) == (label, used)
        assert torch.equal(again[0], clip)
        assert len([r for r in caplog.records if path.name in r.getMessage()]) == 1
        assert list(data.broken) == [path]
        assert path.name in data.broken[path]
        # The stand-in too depends on seed, epoch and index alone.
        fresh = VideoFolder(root, clip=CLIP, training=True)
        assert torch.equal(fresh[index][0], clip)

    def test_evaluation_leaves_it_out_and_counts_it(self, root, caplog):
        path = broken_file(root)
        data = VideoFolder(root, clip=CLIP, training=False)
        with caplog.at_level(logging.WARNING, "ca3d.data"):
            batches = load(data, 0) + load(data, 0)
        indices = [i for batch in batches for i in batch[2]]
        assert len(indices) == 22
        assert list(data.broken) == [path]
        assert len([r for r in caplog.records if path.name in r.getMessage()]) == 1

    def test_workers_tell_the_main_process(self, root):
        path = broken_file(root)
        data = VideoFolder(root, clip=CLIP, training=False)
        assert sum(len(batch[2]) for batch in load(data, 2)) == 11
        assert list(data.broken) == [path]

    def test_a_batch_of_broken_files_only(self):
        clips, labels, indices = collate([None, None])
        assert len(clips) == len(labels) == len(indices) == 0

    def test_all_broken(self, root):
        for sample in find_samples(root):
            sample.path.write_bytes(b"")
        data = VideoFolder(root, clip=CLIP, training=True)
        with pytest.raises(UserError, match="20 videos in a row cannot be read"):
            data[0]

    def test_a_vanished_file(self, root):
        data = VideoFolder(root, clip=CLIP, training=True)
        data.samples[2].path.unlink()
        assert data[2][2] != 2
        assert "no such file" in data.broken[data.samples[2].path]

    def test_listed_files_that_are_missing(self, root, caplog):
        samples = find_samples(root)
        write_list(root / "train.csv", samples, root)
        for sample in samples[:3]:
            sample.path.unlink()
        with caplog.at_level(logging.WARNING, "ca3d.data"):
            data = VideoFolder(root, "train", clip=CLIP, training=True)
        assert len(data) == 9
        assert data.missing == [s.path for s in samples[:3]]
        (record,) = caplog.records
        assert "3 of 12 listed videos are missing" in record.getMessage()
        assert "3 listed videos are missing" in data.describe()

    def test_all_listed_files_missing(self, root):
        (root / "train.csv").write_text("path,label\nx.mp4,a\ny.mp4,b\n")
        with pytest.raises(UserError, match="2 of 2 listed videos are missing"):
            VideoFolder(root, "train", clip=CLIP, training=True)


def test_clips_longer_than_the_videos_are_told(root: Path) -> None:
    (root / "dataset.json").write_text(json.dumps({"frames": 6}))
    for stride, told in ((1, False), (2, True)):
        clip = ClipSpec(frames=4, stride=stride, size=32, resize=32)
        text = VideoFolder(root, clip=clip, training=True).describe()
        assert ("a clip spans 7 frames, the videos have 6 and are looped" in text) == told


class TestFlip:
    def declared(self, root: Path, flip: bool) -> Path:
        (root / "dataset.json").write_text(json.dumps({"horizontal_flip": flip}))
        return root

    def make(self, root: Path, **options) -> VideoFolder:
        return VideoFolder(root, clip=CLIP, training=True, **options)

    def test_default_is_on(self, root):
        data = self.make(root)
        assert data.flip
        assert data.allowed_transforms == {"horizontal_flip": True, "reverse": False}
        assert "horizontal flip on (no class name" in data.describe()

    def test_off_for_class_names_with_sides(self, root):
        (root / "walk").rename(root / "turn_left")
        data = self.make(root)
        assert not data.flip
        assert "horizontal flip off (the class name 'turn_left'" in data.describe()
        assert self.make(root, flip=True).flip

    def test_declared(self, root):
        data = self.make(self.declared(root, False))
        assert not data.flip
        assert "off (as dataset.json says)" in data.describe()
        with pytest.raises(UserError, match="a mirrored video changes its label"):
            self.make(root, flip=True)
        assert not self.make(self.declared(root, True), flip=False).flip
        (root / "walk").rename(root / "turn_left")
        assert self.make(root).flip

    def test_reversal(self, root):
        assert "reversal off (dataset.json does not allow it)" in self.make(root).describe()
        asked = self.make(root, reverse=True)
        assert asked.allowed_transforms["reverse"]
        assert "reversal on (as asked for)" in asked.describe()
        (root / "dataset.json").write_text('{"reverse": true}')
        assert "reversal on (as dataset.json says)" in self.make(root).describe()
        assert not self.make(root, reverse=False).reverse
        (root / "dataset.json").write_text('{"reverse": false}')
        assert not self.make(root).reverse
        with pytest.raises(UserError, match="a video played backwards changes its label"):
            self.make(root, reverse=True)

    def test_half_of_the_clips_are_reversed(self, root):
        def clips(reverse: bool) -> list[Tensor]:
            data = self.make(root, flip=False, augment="none", reverse=reverse)
            seen = []
            for epoch in range(20):
                data.set_epoch(epoch)
                seen.append(data[0][0])
            return seen

        backwards = 0
        for changed, plain in zip(clips(True), clips(False), strict=True):
            assert not torch.equal(plain, plain.flip(1))
            backwards += torch.equal(changed, plain.flip(1))
            assert torch.equal(changed, plain) or torch.equal(changed, plain.flip(1))
        assert 3 <= backwards <= 17


class TestClasses:
    def test_given_order(self, root):
        data = VideoFolder(
            root, clip=CLIP, training=False, classes=["walk", "sit", "jump"]
        )  # fmt: skip
        assert [data.labels[0], data.labels[-1]] == [2, 0]
        assert data.class_counts() == [6, 0, 6]

    def test_unknown(self, root):
        with pytest.raises(UserError, match="class 'walk' is not among the 2 classes"):
            VideoFolder(root, clip=CLIP, training=False, classes=["jump", "sit"])

    def test_duplicate(self, root):
        with pytest.raises(UserError, match="duplicate class names 'walk' and 'walk'"):
            VideoFolder(root, clip=CLIP, training=False, classes=["walk", "walk", "jump"])

    def test_single(self, root):
        shutil.rmtree(root / "walk")
        with pytest.raises(UserError, match="a single class"):
            VideoFolder(root, clip=CLIP, training=True)


def test_list_file(root):
    samples = find_samples(root)
    write_list(root / "few.csv", [samples[0], samples[-1]], root)
    data = VideoFolder(root, clip=CLIP, training=False, list_file=root / "few.csv")
    assert [s.path for s in data.samples] == [samples[0].path, samples[-1].path]


def test_description(dataset):
    clip = ClipSpec(frames=4, stride=2, frames_per_second=12.5, size=32, resize=36)
    text = VideoFolder(dataset, clip=clip, training=False, clips=10, crops=3).describe()
    assert "12 videos, 2 classes of 6 to 6 videos" in text
    assert "4 frames, every 2nd frame at 12.5 frames per second" in text
    assert "10 clips x 3 crops" in text


@pytest.mark.parametrize(
    ("options", "name"),
    [({"seed": -1}, "seed"), ({"clips": 0}, "clips"), ({"crops": 2}, "crops"),
     ({"training": True, "clips": 2}, "training takes one clip"), ({"color": "hsv"}, "color"),
     ({"mean": (1, 2)}, "mean")],
)  # fmt: skip
def test_bad_arguments(dataset, options, name):
    with pytest.raises(ValueError, match=name):
        VideoFolder(dataset, **{"clip": CLIP, "training": False, **options})


def test_negative_epoch(dataset):
    with pytest.raises(ValueError, match="epoch"):
        VideoFolder(dataset, clip=CLIP, training=True).set_epoch(-1)


def test_empty_data_set(tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        VideoFolder(tmp_path, clip=CLIP, training=True)
