import pytest
import torch

from ca3d.data.transforms import Normalize, as_video, evaluation_crops, training_transform


def ramp(frames: int, height: int, width: int) -> torch.Tensor:
    """A clip whose columns grow brighter from left to right, alike in every frame."""
    row = torch.linspace(10, 250, width).to(torch.uint8)
    return row.expand(frames, 3, height, width).contiguous()


@pytest.mark.parametrize("size", [(112, 149), (149, 112), (90, 90), (40, 300)])
def test_training_gives_the_size_asked_for(size):
    transform = training_transform(112, 112)
    for _ in range(8):
        out = transform(as_video(ramp(3, *size)))
        assert out.shape == (3, 3, 112, 112)
        assert out.dtype == torch.uint8


def test_one_draw_holds_for_all_frames():
    transform = training_transform(32, 40)
    outcomes = set()
    for _ in range(60):
        out = transform(as_video(ramp(4, 40, 60)))
        assert (out == out[:1]).all()
        outcomes.add(out[0, 0].numpy().tobytes())
    # Flips, sizes, angles and places: many different outcomes.
    assert len(outcomes) > 20


def test_flip_only_where_allowed():
    def mirrored(flip: bool) -> int:
        transform = training_transform(32, 40, flip)
        out = [transform(as_video(ramp(2, 40, 60)))[0, 0, 16] for _ in range(100)]
        return sum(bool(row[8] > row[24]) for row in out)

    assert mirrored(False) == 0
    assert 25 < mirrored(True) < 75


def test_the_published_shares():
    """Half of the clips pass a random crop, and those alone move off the centre."""
    transform = training_transform(32, 32, flip=False)
    centre = evaluation_crops(ramp(1, 32, 60), 32)[0]
    same = sum(bool((transform(as_video(ramp(1, 32, 60))) == centre).all()) for _ in range(400))
    # Untouched with probability 0.7 (size) x 0.7 (rotation) x 0.5 (crop) = 0.245, and a little
    # more where a draw happens to change nothing.
    assert 70 < same < 140


class TestEvaluationCrops:
    def test_centre(self):
        clip = ramp(2, 40, 60)
        assert torch.equal(evaluation_crops(clip, 32)[0], clip[..., 4:36, 14:46])

    def test_three_along_the_longer_side(self):
        clip = ramp(2, 32, 60)
        left, centre, right = evaluation_crops(clip, 32, 3)
        assert torch.equal(left, clip[..., :32])
        assert torch.equal(centre, clip[..., 14:46])
        assert torch.equal(right, clip[..., -32:])
        top, middle, bottom = evaluation_crops(clip.mT, 32, 3)
        assert torch.equal(top, left.mT)
        assert torch.equal(middle, centre.mT)
        assert torch.equal(bottom, right.mT)

    def test_smaller_frames_are_padded_with_black(self):
        out = evaluation_crops(ramp(1, 20, 24), 32)[0]
        assert out.shape == (1, 3, 32, 32)
        assert (out[..., :6, :] == 0).all()
        assert evaluation_crops(ramp(1, 20, 24), 32, 3).shape == (3, 1, 3, 32, 32)

    @pytest.mark.parametrize("crops", [0, 2, 5])
    def test_bad_number(self, crops):
        with pytest.raises(ValueError, match="crops must be 1 or 3"):
            evaluation_crops(ramp(1, 32, 32), 16, crops)


class TestNormalize:
    MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

    def test_definition(self):
        frames = torch.randint(256, (2, 5, 3, 6, 7), dtype=torch.uint8)
        out = Normalize(self.MEAN, self.STD)(frames)
        mean = torch.tensor(self.MEAN, dtype=torch.float64).view(3, 1, 1, 1)
        std = torch.tensor(self.STD, dtype=torch.float64).view(3, 1, 1, 1)
        expected = (frames.movedim(-4, -3).double() / 255 - mean) / std
        assert out.dtype == torch.float32
        assert out.shape == (2, 3, 5, 6, 7)
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)

    def test_blue_first(self):
        frames = torch.randint(256, (5, 3, 6, 7), dtype=torch.uint8)
        expected = Normalize(self.MEAN, self.STD)(frames[:, [2, 1, 0]])
        assert torch.equal(Normalize(self.MEAN, self.STD, "bgr")(frames), expected)

    def test_default_leaves_0_to_1(self):
        assert Normalize()(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).unique() == 1

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [({"color": "RGB"}, "color"), ({"mean": (0.5,)}, "mean"), ({"std": (1, 1, 0)}, "std"),
         ({"mean": (0, float("nan"), 0)}, "mean"), ({"std": (1, 1, -1)}, "std")],
    )  # fmt: skip
    def test_bad_arguments(self, arguments, name):
        with pytest.raises(ValueError, match=name):
            Normalize(**arguments)


def test_without_augmentation_a_clip_is_only_cropped() -> None:
    clip = torch.arange(2 * 3 * 20 * 24, dtype=torch.int32).remainder(256).to(torch.uint8)
    clip = clip.reshape(2, 3, 20, 24)
    transform = training_transform(16, 20, flip=False, augment="none")
    assert torch.equal(transform(as_video(clip)), clip[..., 2:18, 4:20])
    with pytest.raises(ValueError, match="augment must be one of light, none, got 'strong'"):
        training_transform(16, 20, augment="strong")
