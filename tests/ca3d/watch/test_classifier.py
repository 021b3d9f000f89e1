import numpy as np
import pytest
import torch
from untrained import save_model

from ca3d import models, weights
from ca3d.data.transforms import Normalize
from ca3d.errors import UserError
from ca3d.streaming import Stream
from ca3d.watch.classifier import Classifier, SlidingWindow


@pytest.fixture
def loaded(model_file):
    return weights.load(model_file)


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_every_window_is_that_of_the_whole_clip(loaded, make_frames, stride):
    model, info = loaded
    frames = make_frames(30)
    classifier = Classifier(model, info, stride)
    assert isinstance(classifier._stepper, Stream)
    seen = {}
    for number, picture in enumerate(frames):
        logits = classifier.push(picture)
        if logits is not None:
            seen[number] = logits
    assert list(seen) == list(range(7, 30, stride))
    clips = Normalize(info.mean, info.std)(torch.from_numpy(frames).permute(0, 3, 1, 2))
    for last, logits in seen.items():
        with torch.no_grad():
            whole = model(clips[None, :, last - 7 : last + 1])[0]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_streaming_and_whole_windows_are_due_at_the_same_frames(loaded, make_frames, stride):
    model, info = loaded
    streaming, whole = Classifier(model, info, stride), Classifier(model, info, stride)
    whole._stepper = SlidingWindow(whole._whole_clip, info.frames, stride)
    for picture in make_frames(30):
        a, b = streaming.push(picture), whole.push(picture)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_after_a_reset_a_window_begins_anew(loaded, make_frames):
    model, info = loaded
    frames = make_frames(30)
    classifier, fresh = Classifier(model, info, 4), Classifier(model, info, 4)
    for picture in frames[:13]:
        classifier.push(picture)
    classifier.reset()
    for picture in frames[13:]:
        a, b = classifier.push(picture), fresh.push(picture)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)


class Foreign(torch.nn.Module):
    """A model that sees nothing but whole clips."""

    def forward(self, clip):
        return clip.mean((3, 4)).flatten(1)[:, :3]


def test_a_model_without_a_per_frame_part(loaded, make_frames):
    classifier = Classifier(Foreign(), loaded[1], 4)
    assert isinstance(classifier._stepper, SlidingWindow)
    seen = [classifier.push(picture) for picture in make_frames(16)]
    assert [x is not None for x in seen].count(True) == 3


def test_weights_that_contradict_their_model(tmp_path):
    model, info = weights.load(save_model(tmp_path / "m.safetensors", frames=6))
    with pytest.raises(UserError, match="clips of 6 frames, their model takes 8"):
        Classifier(model, info, 4)


def test_a_float16_model(tmp_path):
    model = models.create("ca3d_tiny", num_classes=3, frames=8, widths=[4, 4, 8, 8])
    info = weights.ModelInfo(
        model.name,
        model.options,
        ("a", "b", "c"),
        mean=(0.3,) * 3,
        std=(0.2,) * 3,
        frames=8,
        size=32,
        resize=32,
        precision="float16",
    )
    weights.save(tmp_path / "half.safetensors", model, info, torch.float16)
    classifier = Classifier(*weights.load(tmp_path / "half.safetensors"), stride=8)
    pictures = np.zeros((8, 32, 32, 3), dtype=np.uint8)
    logits = [classifier.push(picture) for picture in pictures][-1]
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_out_of_range(loaded, stride):
    with pytest.raises(ValueError, match="stride must be 1 to 8"):
        Classifier(*loaded, stride)
