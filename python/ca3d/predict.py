"""Recognising what happens in video files, over time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from ca3d import precision, weights
from ca3d.data.reader import VIDEO_SUFFIXES, VideoReader, open_video
from ca3d.data.sampling import ClipSpec
from ca3d.data.transforms import Normalize, apply_cut, evaluation_crops
from ca3d.data.view import View, short_side_size
from ca3d.errors import UserError
from ca3d.evaluate import weights_file
from ca3d.models import CA3D
from ca3d.models.fusion import fuse
from ca3d.streaming import Stream
from ca3d.training.device import choose_device


@dataclass(frozen=True)
class Label:
    """A class with its probability.

    Example:
        >>> Label("walk", 0.75).name
        'walk'
    """

    name: str
    probability: float


@dataclass(frozen=True)
class Window:
    """What the model made of one stretch of a video.

    Args:
        start: Seconds from the video's begin.
        end: Likewise.
        labels: The likeliest classes, likeliest first.

    Example:
        >>> Window(0.0, 1.0, [Label("walk", 0.75)]).labels[0].name
        'walk'
    """

    start: float
    end: float
    labels: list[Label]


@dataclass(frozen=True)
class Prediction:
    """What the model made of a video.

    Args:
        path: The video file.
        duration: Its length in seconds.
        labels: The likeliest classes over the whole video, by the mean of the windows.
        windows: Overlapping stretches of it, in order of time.
        classes: All class names.
        probabilities: (windows, classes) float32.

    Example:
        >>> best = Label("walk", 0.75)
        >>> prediction = Prediction(
        ...     Path("a.mp4"), 1.0, [best], [Window(0.0, 1.0, [best])], ("walk", "run"),
        ...     torch.tensor([[0.75, 0.25]]),
        ... )
        >>> print(prediction)
        a.mp4: walk 75 %
        >>> prediction.to_dict()["windows"][0]["labels"]
        [{'name': 'walk', 'probability': 0.75}]
    """

    path: Path
    duration: float
    labels: list[Label]
    windows: list[Window]
    classes: tuple[str, ...] = field(repr=False)
    probabilities: Tensor = field(repr=False)

    def __str__(self) -> str:
        likeliest = ", ".join(f"{x.name} {100 * x.probability:.0f} %" for x in self.labels)
        return f"{self.path}: {likeliest}"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "path": str(self.path),
            "duration": self.duration,
            "labels": [vars(label) for label in self.labels],
            "windows": [
                {"start": w.start, "end": w.end, "labels": [vars(label) for label in w.labels]}
                for w in self.windows
            ],
        }

    def save_picture(self, path: str | Path, frames: int = 10) -> None:
        """Draws frames of the video above the timeline of its labels.

        Args:
            path: The PNG to write.
            frames: Number of frames to show.

        Raises:
            ca3d.errors.UserError: The video can't be read any more, or the picture not written.
        """
        from ca3d.report.timeline import draw_timeline

        draw_timeline(self, Path(path), frames)


class Predictor:
    """A model together with what it needs to know about its input.

    Args:
        model: Maps (batch, 3, frames, height, width) to (batch, classes).
        info: Classes, colour order, statistics, clip length, frame rate and crop of the model.
        device: Where to compute.

    Raises:
        ca3d.errors.UserError: `info` lacks what prediction needs.

    Example:
        >>> from ca3d import models
        >>> model = models.create("ca3d_tiny", num_classes=2)
        >>> info = weights.ModelInfo(
        ...     "ca3d_tiny", model.options, classes=("run", "walk"), mean=(0.4, 0.4, 0.4),
        ...     std=(0.2, 0.2, 0.2), size=32, resize=32,
        ... )
        >>> prediction = Predictor(model, info).predict(video_file)
        >>> len(prediction.windows), prediction.windows[0].start
        (2, 0.0)
    """

    def __init__(
        self, model: nn.Module, info: weights.ModelInfo, device: torch.device | None = None
    ) -> None:
        check_complete(info)
        self.info = info
        self.device = device or torch.device("cpu")
        self.regime = precision.for_inference(info.precision)
        self.model = self.regime.prepare(model).eval()
        self.clip = clip_spec(info)
        self._normalize = Normalize(info.mean, info.std, info.color)

    @classmethod
    def from_file(
        cls, file: str | Path, device: str | None = None, runtime: str = "torch"
    ) -> Predictor:
        """Loads a weights file, or what `ca3d export onnx` made of it.

        Args:
            file: A `.safetensors` file, or the folder of a run (its best weights); for "onnx" an
                exported folder or its clip.onnx.
            device: "cpu", "cuda" ...; None takes CUDA when there is one.
            runtime: "torch", or "onnx" for ONNX Runtime on the CPU.

        Returns:
            The predictor.

        Raises:
            ca3d.errors.UserError: The file is missing, damaged or incomplete, or the runtime is
                missing or can't compute on the device.
            ValueError: An unknown runtime.
        """
        if runtime not in ("torch", "onnx"):
            raise ValueError(f"runtime must be torch or onnx, got {runtime!r}")
        if runtime == "onnx":
            from ca3d.export.onnx_runtime import OnnxClassifier

            if device not in (None, "auto", "cpu"):
                raise UserError(f"ONNX Runtime computes on the CPU here, not on {device}")
            exported = OnnxClassifier(file)
            model: nn.Module = exported
            # Whatever the precision inside, clips and logits are float32.
            info, place = replace(exported.info, precision="float32"), torch.device("cpu")
        elif Path(file).suffix == ".onnx":
            raise UserError(f"{file}: an exported file; use it with --runtime onnx")
        else:
            file = weights_file(file)
            place = choose_device(device or "auto")
            model, info = load_for_inference(file, place)
        try:
            return cls(model, info, place)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    def predict(
        self,
        path: str | Path,
        *,
        top_k: int = 5,
        overlap: float = 0.5,
        batch_size: int = 8,
        decoder: str = "auto",
    ) -> Prediction:
        """Classifies a video, stretch by stretch.

        Args:
            path: A video file.
            top_k: Number of classes in each answer; all when there are fewer.
            overlap: Share of a window that the next one sees again, in [0, 1).
            batch_size: Windows computed at once.
            decoder: "auto", "av" or "torchcodec".

        Returns:
            Labels of the whole video and of every window.

        Raises:
            ValueError: An argument is out of range.
            ca3d.data.reader.VideoError: The file can't be read.
        """
        if top_k < 1 or batch_size < 1:
            raise ValueError(
                f"top_k and batch_size must be at least 1, not {top_k} and {batch_size}"
            )
        with open_video(path, decoder) as video:
            positions = window_positions(video, self.clip, overlap)
            rate = video.frames_per_second
            duration = video.num_frames / rate
            parts = [
                self._probabilities(video, positions[i : i + batch_size])
                for i in range(0, len(positions), batch_size)
            ]
        probabilities = torch.cat(parts)
        if self.clip.frames_per_second is None:
            starts = positions[:, 0] / rate
        else:
            starts = positions[:, 0] - 0.5 / rate
        span = self.clip.span(rate)
        windows = [
            Window(float(start), float(min(start + span, duration)), self._top(row, top_k))
            for start, row in zip(starts, probabilities, strict=True)
        ]
        labels = self._top(probabilities.mean(0), top_k)
        return Prediction(Path(path), duration, labels, windows, self.info.classes, probabilities)

    def prepare(self, frames: Tensor) -> Tensor:
        """Turns frames of a video into the model's input, as `predict` does.

        Args:
            frames: uint8 (n, 3, H, W), RGB, whole; the model's view is cut out of them, its shorter
                side resized to the model's `resize`, and the centre cut out of that.

        Returns:
            float32 (3, n, size, size), normalised, in the model's colour order: what
            `ca3d.Stream.push` takes.

        Raises:
            TypeError: not uint8.
            ValueError: another shape.
            ca3d.errors.UserError: the model's view reaches beyond the frames.
        """
        if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
            kind = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
            raise TypeError(f"frames must be a uint8 tensor, got {kind}")
        if frames.dim() != 4 or frames.shape[1] != 3 or min(frames.shape) < 1:
            raise ValueError(
                "frames must have the shape (frames, 3, height, width) without empty dimensions, "
                f"got {tuple(frames.shape)}"
            )
        height, width = frames.shape[2:]
        cut = self.clip.view.cut(width, height, self.clip.resize)
        wide, high = short_side_size(width, height, cut.short_side)
        if (high, wide) != (height, width):
            frames = v2.functional.resize(frames, [high, wide], antialias=True)
        frames = apply_cut(frames, cut)
        return self._normalize(evaluation_crops(frames, self.clip.size)[0])

    def stream(self, stride: int = 1) -> Stream:
        """Begins to watch a video of which frames come one after the other.

        Args:
            stride: frames from one window to the next.

        Returns:
            A stream in the model's precision; it takes what `prepare` returns. Frames must come at
            the model's rate: every `info.stride`-th of `info.frames_per_second` (or of the video).

        Raises:
            TypeError, ValueError: see `ca3d.Stream`.
        """
        return Stream(self.model, stride, precision=self.info.precision)

    @torch.no_grad()
    def _probabilities(self, video: VideoReader, positions: np.ndarray) -> Tensor:
        frames = self.clip.read(video, positions, short_side=self.clip.resize)
        clips = self._normalize(evaluation_crops(frames, self.clip.size)[0])
        logits = self.regime.forward(self.model, clips.to(self.device))
        if not bool(logits.isfinite().all()):
            raise UserError(
                f"{video.path}: the model's output is not finite; are the weights sound?"
            )
        return F.softmax(logits, dim=1).cpu()

    def _top(self, probabilities: Tensor, k: int) -> list[Label]:
        values, places = probabilities.topk(min(k, len(self.info.classes)))
        return [
            Label(self.info.classes[i], p)
            for p, i in zip(values.tolist(), places.tolist(), strict=True)
        ]


def load_for_inference(
    file: str | Path, device: torch.device
) -> tuple[nn.Module, weights.ModelInfo]:
    """Loads a weights file, a CA3D model fused (`ca3d.fuse`), any other as it is.

    Args:
        file: A `.safetensors` file.
        device: Where the model shall be.

    Returns:
        The model in evaluation mode, and its information.

    Raises:
        ca3d.errors.UserError: The file can't be used.

    Example:
        >>> load_for_inference("missing.safetensors", torch.device("cpu"))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    model, info = weights.load(file, device=str(device))
    return (fuse(model) if isinstance(model, CA3D) else model.eval()), info


def clip_spec(info: weights.ModelInfo) -> ClipSpec:
    """Returns the clip that a model was trained on.

    Args:
        info: The model's information.

    Example:
        >>> clip_spec(weights.ModelInfo("ca3d", {}, frames=8)).frames
        8
    """
    return ClipSpec(
        frames=info.frames,
        stride=info.stride,
        frames_per_second=info.frames_per_second,
        size=info.size,
        resize=info.resize,
        window=info.window,
        view=View.parse(info.view),
    )


def check_complete(info: weights.ModelInfo) -> None:
    """Raises `UserError` when a model does not know, or contradicts, what its input looks like.

    Args:
        info: The model's information.

    Example:
        >>> check_complete(weights.ModelInfo("ca3d", {}, classes=("run", "walk")))
        Traceback (most recent call last):
        ca3d.errors.UserError: the weights do not say what the model's input and output mean; \
convert them again with --mean, --std (ca3d convert)
    """
    lacks = [
        name
        for name, value in (
            ("--classes", info.classes),
            ("--color", info.color),
            ("--mean", info.mean),
            ("--std", info.std),
        )
        if not value
    ]
    if lacks:
        raise UserError(
            "the weights do not say what the model's input and output mean; convert them again"
            f" with {', '.join(lacks)} (ca3d convert)"
        )
    if (frames := info.options.get("frames", info.frames)) != info.frames:
        raise UserError(
            f"the weights say clips of {info.frames} frames, their model takes {frames}"
        )


def window_positions(video: VideoReader, clip: ClipSpec, overlap: float = 0.5) -> np.ndarray:
    """Places overlapping windows over a whole video, evenly from its begin to its end.

    Args:
        video: An open video.
        clip: The model's clip.
        overlap: Least share of a window that the next one sees again, in [0, 1).

    Returns:
        (windows, frames), as `ClipSpec.sample` returns them for `ClipSpec.read`; a single window
        where the video is no longer than one.

    Raises:
        ValueError: `overlap` is out of range.

    Example:
        >>> with open_video(video_file) as video:
        ...     window_positions(video, ClipSpec(frames=4, stride=5))[:, 0].tolist()
        [0, 10, 20]
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1), not {overlap}")
    rate = video.frames_per_second
    step = clip.stride * (rate / clip.frames_per_second if clip.frames_per_second else 1.0)
    room = math.floor(video.num_frames - clip.frames * step)
    if room <= 0:
        return clip.sample(video.num_frames, rate, mode="center")
    windows = 1 + math.ceil(room / max(1.0, clip.frames * step * (1 - overlap)))
    return clip.sample(video.num_frames, rate, mode="uniform", clips=windows)


def find_videos(path: str | Path) -> list[Path]:
    """Lists the videos of a folder and its sub-folders, sorted; a file is taken as it is.

    Args:
        path: A file or folder.

    Returns:
        At least one file.

    Raises:
        ca3d.errors.UserError: The path does not exist or the folder holds no video.

    Example:
        >>> find_videos("missing")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing: no such file or folder
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    found = sorted(_videos(path))
    if not found:
        known = " ".join(sorted(VIDEO_SUFFIXES))
        raise UserError(f"{path}: no video in this folder (looked for {known})")
    return found


def _videos(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.name.lower().endswith(tuple(VIDEO_SUFFIXES)) and file.is_file():
            yield file
