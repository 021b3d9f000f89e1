"""What a clip's class must not be read from."""

import itertools
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from ca3d.data.embedded.encode import CODECS, write_video
from ca3d.data.embedded.mocap import draw_clip, mocap_classes, render_mocap
from ca3d.data.embedded.recipe import Recipe

# The last frame is a second after the first; nothing in between is looked at.
FRAMES = 3
FRAMES_PER_SECOND = 2

# What all clips of one test have in common, besides the camera.
SHARED = ("body", "look", "background_hue", "background_texture", "shadow")


def ridge_accuracy(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], classes: int
) -> float:
    """Test accuracy of a one-against-all ridge classifier on standardised features."""
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0) + 1e-6
    features, features_test = (np.c_[(f - mean) / std, np.ones(len(f))] for f in (x, x_test))
    gram = features @ features.T + 0.3 * len(x) * np.eye(len(x))
    weights = features.T @ np.linalg.solve(gram, np.eye(classes)[y])
    return float(((features_test @ weights).argmax(1) == y_test).mean())


def upper_bound(chance: float, count: int) -> float:
    """Chance and four standard deviations of its accuracy over `count` guesses."""
    return chance + 4 * np.sqrt(chance * (1 - chance) / count)


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, features): brightness on a 16x16 grid."""
    grey = frames.astype(np.float64).mean(-1)
    side = grey.shape[1] // 16
    return grey.reshape(len(grey), 16, side, 16, side).mean((2, 4)).reshape(len(grey), -1)


def mocap_first_frames(count: int, seed: int, at_start: bool) -> tuple[np.ndarray, np.ndarray]:
    """First frames and labels of mocap30 clips; `at_start`: of clips without the random phase.

    All clips share one view, body and background, which makes it as easy as can be to see in the
    pose or in the figure's place what may not be there.
    """
    common = draw_clip(np.random.default_rng(9), 0, "train", 32, 0.0, True)
    view = replace(common.camera, yaw=0.2, center=(16.0, 18.0))
    first, labels = [], []
    for index in range(count):
        label = index % 30
        clip = draw_clip(np.random.default_rng([seed, index]), label, "train", 32, 0.0, True)
        phase = 0.0 if at_start else clip.phase
        clip = replace(
            clip, phase=phase, camera=view, **{name: getattr(common, name) for name in SHARED}
        )
        first.append(render_mocap(clip, FRAMES, FRAMES_PER_SECOND)[0])
        labels.append(label)
    return thumbnails(np.stack(first)), np.array(labels)


def test_length_and_bytes_are_constant(made: Path) -> None:
    files = list(made.glob("*/*.avi"))
    assert len(files) == 90
    assert len({file.stat().st_size for file in files}) == 1


@pytest.mark.parametrize("codec", CODECS)
def test_compression_knows_no_direction_of_time(codec: str, tmp_path: Path) -> None:
    """A video played backwards is compressed to the same frames and bytes, in reverse order."""
    video, _ = Recipe("mocap30", 32, 10, 16, 0.0, 0).render("train", 2)
    decoded, sizes = [], []
    for name, frames in (("forward", video), ("backward", video[::-1])):
        file = tmp_path / f"{name}{CODECS[codec][0]}"
        write_video(file, np.ascontiguousarray(frames), 16, codec)
        with av.open(str(file)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
            assert all(packet.is_keyframe for packet in packets)
            sizes.append([packet.size for packet in packets])
        with av.open(str(file)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            decoded.append(np.stack(pictures))
    np.testing.assert_array_equal(decoded[0], decoded[1][::-1])
    # H.264 writes its headers into the first packet and numbers its key frames in alternation.
    slack = 0 if codec == "mpeg4" else 2
    assert all(abs(a - b) <= slack for a, b in zip(sizes[0][1:-1], sizes[1][-2:0:-1], strict=True))


def test_reversed_clips_are_the_same_frames_in_reverse() -> None:
    clip = draw_clip(np.random.default_rng(0), 9, "train", 32, 0.5, True)
    assert clip.backwards
    forward = render_mocap(replace(clip, backwards=False), 6, 16.0)
    np.testing.assert_array_equal(render_mocap(clip, 6, 16.0), forward[::-1])
    # Both classes draw everything else alike.
    other = draw_clip(np.random.default_rng(0), 8, "train", 32, 0.5, True)
    assert other.varied() == clip.varied()
    assert (other.motion, other.phase, other.seed) == (clip.motion, clip.phase, clip.seed)


def test_the_first_frame_does_not_tell_the_direction() -> None:
    train = mocap_first_frames(600, 1, at_start=False)
    test = mocap_first_frames(300, 2, at_start=False)
    # Directions of one action at a time are guessed from its own first frames.
    right = []
    for action in range(15):
        parts = [(x[y // 2 == action], y[y // 2 == action] % 2) for x, y in (train, test)]
        right.append(ridge_accuracy(parts[0], parts[1], 2))
    assert np.mean(right) < upper_bound(0.5, 300)
    # The action itself shows in a pose, but never more than half of the 30 classes.
    actions = ridge_accuracy((train[0], train[1] // 2), (test[0], test[1] // 2), 15)
    assert actions > upper_bound(1 / 15, 300)
    assert ridge_accuracy(train, test, 30) < 0.5


def test_the_leak_test_would_notice_a_fixed_start() -> None:
    """Without the random phase the first frame is the first or the last pose: that is found."""
    train, test = (mocap_first_frames(300, seed, at_start=True) for seed in (1, 2))
    right = []
    for action in range(15):
        parts = [(x[y // 2 == action], y[y // 2 == action] % 2) for x, y in (train, test)]
        right.append(ridge_accuracy(parts[0], parts[1], 2))
    assert np.mean(right) > upper_bound(0.5, 300)


def order_features(count: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    recipe = Recipe("motion-order", 32, 16, 16, 0.0, seed)
    videos = np.stack([recipe.render("train", index)[0] for index in range(count)])
    labels = np.array([recipe.label(index) for index in range(count)])
    grey = videos.astype(np.float64).mean(-1)
    moving = np.abs(grey - np.median(grey, 1, keepdims=True))
    features = {
        "first frame": thumbnails(videos[:, 0]),
        # Orderless summaries of the set of frames: where the sprite was, how often, how spread.
        "bag of frames": np.concatenate(
            [
                summary(moving, 1).reshape(count, 32, 2, 16).mean(2).reshape(count, -1)
                if axis
                else summary(moving, 1).reshape(count, 16, 2, 32).mean(2).reshape(count, -1)
                for summary, axis in itertools.product((np.mean, np.max, np.std), (0, 1))
            ],
            1,
        ),
        "sequence": _directions(moving),
    }
    return features, labels


def _directions(moving: np.ndarray) -> np.ndarray:
    """How well each half's frames match their predecessor, shifted by 2 pixels in 4 directions."""
    halves = []
    for half in (moving[:, :7], moving[:, 9:]):
        before, after = half[:, :-1], half[:, 1:]
        for axis, shift in itertools.product((2, 3), (-2, 2)):
            halves.append((np.roll(before, shift, axis) * after).mean((1, 2, 3)))
    scores = np.stack(halves, 1)
    return np.asarray(scores / scores.mean(1, keepdims=True))


def test_neither_a_frame_nor_a_bag_of_frames_tells_the_order() -> None:
    train, labels = order_features(480, 1)
    test, test_labels = order_features(240, 2)
    accuracy = {
        key: ridge_accuracy((train[key], labels), (test[key], test_labels), 8) for key in train
    }
    assert accuracy["first frame"] < upper_bound(1 / 8, 240)
    assert accuracy["bag of frames"] < upper_bound(1 / 8, 240)
    # The same classifier succeeds where the order of the frames may be used.
    assert accuracy["sequence"] > 0.5


def test_classes_of_a_pair_differ_in_direction_only() -> None:
    names = mocap_classes(True)
    assert all(b == f"{a}-reversed" for a, b in zip(names[::2], names[1::2], strict=True))
