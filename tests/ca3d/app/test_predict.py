"""Predictions over time: windows, colours, agreement with evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_videos import RATE, SIDE, bar_video, write_video
from torch import Tensor, nn

import ca3d
from ca3d import weights
from ca3d.data.folder import VideoFolder
from ca3d.data.reader import open_video
from ca3d.errors import UserError
from ca3d.predict import Predictor, clip_spec, find_videos, window_positions

INFO = weights.ModelInfo(
    "ca3d_tiny",
    {"num_classes": 3},
    classes=("red", "green", "blue"),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    frames=4,
    stride=2,
    frames_per_second=float(RATE),
    size=SIDE,
    resize=SIDE,
)


class MeanColor(nn.Module):
    """Logits are the means of the three channels, times ten."""

    def forward(self, clips: Tensor) -> Tensor:
        return 10 * clips.mean((2, 3, 4))


def film(path: Path, seconds: float, rate: int = RATE) -> Path:
    """Red in its first half, blue in its second."""
    frames = np.zeros((round(seconds * rate), SIDE, SIDE, 3), np.uint8)
    frames[: len(frames) // 2, ..., 0] = 200
    frames[len(frames) // 2 :, ..., 2] = 200
    write_video(path, frames, rate)
    return path


def test_windows_cover_the_video_and_overlap(tmp_path: Path) -> None:
    # 4 frames at stride 2 and 10 frames a second span 0.8 s.
    prediction = Predictor(MeanColor(), INFO).predict(film(tmp_path / "a.avi", 4.0), overlap=0.5)
    starts = [window.start for window in prediction.windows]
    assert starts[0] == pytest.approx(0.0)
    assert prediction.windows[-1].end == pytest.approx(prediction.duration) == pytest.approx(4.0)
    assert all(w.end - w.start == pytest.approx(0.8) for w in prediction.windows)
    assert max(np.diff(starts)) <= 0.4 + 0.1
    assert len(prediction.windows) == 9


def test_weights_that_contradict_their_model_are_refused() -> None:
    info = replace(INFO, options={"num_classes": 3, "frames": 16})
    with pytest.raises(UserError, match="clips of 4 frames, their model takes 16"):
        Predictor(MeanColor(), info)


def test_labels_follow_the_video(tmp_path: Path) -> None:
    prediction = Predictor(MeanColor(), INFO).predict(film(tmp_path / "a.avi", 4.0), top_k=2)
    for window in prediction.windows:
        if window.end < 1.9:
            assert window.labels[0].name == "red"
        if window.start > 2.1:
            assert window.labels[0].name == "blue"
    assert prediction.probabilities.shape == (len(prediction.windows), 3)
    torch.testing.assert_close(prediction.probabilities.sum(1), torch.ones(len(prediction.windows)))
    mean = prediction.probabilities.mean(0)
    assert prediction.labels[0].probability == pytest.approx(float(mean.max()))
    assert [len(prediction.labels), len(prediction.windows[0].labels)] == [2, 2]


def test_colour_order_of_the_model_is_obeyed(tmp_path: Path) -> None:
    video = film(tmp_path / "a.avi", 4.0)
    bgr = Predictor(MeanColor(), replace(INFO, color="bgr")).predict(video)
    assert bgr.windows[0].labels[0].name == "blue"
    assert bgr.windows[-1].labels[0].name == "red"


def test_other_frame_rates_are_resampled(tmp_path: Path) -> None:
    slow = Predictor(MeanColor(), INFO).predict(film(tmp_path / "slow.avi", 4.0))
    fast = Predictor(MeanColor(), INFO).predict(film(tmp_path / "fast.avi", 4.0, rate=30))
    assert len(slow.windows) == len(fast.windows)
    assert fast.windows[0].end == pytest.approx(0.8, abs=0.05)
    torch.testing.assert_close(slow.probabilities, fast.probabilities, atol=0.1, rtol=0)


def test_a_short_video_is_one_window(tmp_path: Path) -> None:
    prediction = Predictor(MeanColor(), INFO).predict(film(tmp_path / "a.avi", 0.4))
    assert len(prediction.windows) == 1
    assert prediction.windows[0].end == pytest.approx(0.4)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rate", [None, 7.0, 25.0])
def test_window_positions_stay_inside(tmp_path: Path, overlap: float, rate: float | None) -> None:
    clip = clip_spec(replace(INFO, frames_per_second=rate))
    with open_video(film(tmp_path / "a.avi", 5.0)) as video:
        positions = window_positions(video, clip, overlap)
        last = video.num_frames - 1 if rate is None else video.duration
        assert positions.min() >= 0
        assert positions.max() <= last
        assert (np.diff(positions[:, 0]) > 0).all()


def test_a_prediction_of_one_window_is_what_evaluation_sees(bars: Path, trained: Path) -> None:
    predictor = ca3d.load(trained)
    info = predictor.info
    dataset = VideoFolder(
        bars, "test", clip=clip_spec(info), training=False, mean=info.mean, std=info.std
    )
    centered = replace(predictor.clip, frames=info.frames)
    for index in range(len(dataset)):
        item = dataset[index]
        assert item is not None
        with torch.no_grad():
            expected = predictor.model(item[0][None]).softmax(1)[0]
        with open_video(dataset.samples[index].path) as video:
            positions = centered.sample(video.num_frames, video.frames_per_second)
            ours = predictor._probabilities(video, positions)[0]
        torch.testing.assert_close(ours, expected)


def test_loading_gives_the_trained_model(bars: Path, trained: Path) -> None:
    first = ca3d.load(trained / "best.safetensors").predict(bars / "up" / "01.avi")
    second = ca3d.load(str(trained), device="cpu").predict(str(bars / "up" / "01.avi"))
    assert torch.equal(first.probabilities, second.probabilities)
    assert first.classes == ("down", "up")


@pytest.mark.parametrize("lacking", [{"classes": ()}, {"mean": None}, {"std": None}])
def test_models_that_do_not_know_their_input_are_refused(lacking: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(lacking))}"):
        Predictor(MeanColor(), replace(INFO, **lacking))  # type: ignore[arg-type]


def test_weights_that_give_nan_are_noticed(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, clips: Tensor) -> Tensor:
            return torch.full((len(clips), 3), torch.nan)

    with pytest.raises(UserError, match="not finite"):
        Predictor(Broken(), INFO).predict(film(tmp_path / "a.avi", 1.0))


def test_folders_are_searched_for_videos(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/x.avi", "a.AVI"):
        write_video(tmp_path / "v.avi", bar_video("up", 0))
        (tmp_path / "v.avi").rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no video")
    assert [p.name for p in find_videos(tmp_path)] == ["a.AVI", "x.avi"]
