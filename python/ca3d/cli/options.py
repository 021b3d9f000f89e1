"""The options of the commands that have no module of their own."""

# `option` returns dataclasses.field(...), which is what a default should be.
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ca3d.data.split_options import SplitOptions
from ca3d.options import option


@dataclass
class PredictConfig:
    """Every option of `ca3d predict`.

    Example:
        >>> PredictConfig("video.mp4", "best.safetensors").top_k
        5
    """

    path: str = option("", "Video file, or folder of videos", "Input", positional=True)
    weights: str = option(
        "",
        "Weights file (.safetensors) or run folder; with --runtime onnx a folder of"
        " `ca3d export onnx` or its clip.onnx",
        "Input",
    )
    top_k: int = option(5, "Classes in each answer", "Answer")
    overlap: float = option(0.5, "Share of a window that the next one sees again", "Answer")
    windows: bool = option(False, "Show every window, not only whole videos", "Answer")
    json: bool = option(False, "Print JSON instead of a table", "Answer")
    picture: str | None = option(
        None, "PNG of frames above the label timeline; for a folder of videos, a folder", "Answer"
    )
    force: bool = option(False, "Replace pictures that are there", "Answer")
    batch_size: int = option(8, "Windows computed at once", "Run")
    runtime: Literal["torch", "onnx"] = option("torch", "What computes the model", "Run")
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)", "Run")
    decoder: Literal["auto", "av", "torchcodec"] = option("auto", "Video decoder", "Run")


@dataclass
class ConvertConfig:
    """Every option of `ca3d convert`.

    Example:
        >>> ConvertConfig("model.pt", "model.safetensors").color
        'bgr'
    """

    input: str = option("", "Published weights or training checkpoint (.pt)", positional=True)
    out: str = option("", "Weights file to write (.safetensors)")
    force: bool = option(False, "Replace that file if it is there")
    classes: str | None = option(
        None, "Class names in order: a text file of one a line, or names separated by commas"
    )
    color: Literal["bgr", "rgb"] = option("bgr", "Colour order that the model was trained on")
    mean: list[float] | None = option(
        None, "Channel means in [0, 1], in the order of --color", count=3
    )
    std: list[float] | None = option(None, "Channel standard deviations, likewise", count=3)
    model: str | None = option(None, "Model (default: found out from the shapes)")
    frames: int | None = option(None, "Frames in a clip (default: as the weights say)")
    stride: int = option(2, "Frames from one sampled frame to the next")
    fps: float | None = option(None, "Frame rate that the stride counts in")
    size: int = option(112, "Height and width of a clip in pixels")
    resize: int | None = option(None, "Short side before cropping (default: --size)")
    precision: Literal["float32", "float16", "float64"] = option("float32", "Dtype to store")
    trained_on: str = option("", "What the model was trained on, to be stored")


@dataclass
class MakeConfig:
    """Every option of `ca3d data make`.

    Example:
        >>> MakeConfig("mocap30", "videos").size
        'default'
    """

    name: str = option("", "Data set (see `ca3d data list`)", positional=True)
    out: str = option("", "Folder to make", positional=True)
    size: Literal["small", "default", "large"] = option("default", "How many videos")
    clutter: float = option(0.0, "Distractors, from 0 (a plain room) to 1 (everywhere)")
    codec: Literal["mpeg4", "h264"] = option("mpeg4", "Video codec")
    resolution: int = option(64, "Side of the frames in pixels")
    frames: int | None = option(None, "Frames of a video (default: the data set's own)")
    frames_per_second: int = option(16, "Frame rate of the videos")
    segments: Literal[2, 3] = option(2, "Motions in a row in motion-order")
    views: Literal["side", "all"] = option(
        "side", "Cameras of the mocap sets: around the figure's right side, or all around (harder)"
    )
    background: bool = option(
        False, "Add the class background to a mocap set: an empty room, or somebody standing still"
    )
    seed: int = option(0, "Another seed gives other videos")
    workers: int = option(2, "Processes")
    force: bool = option(False, "Replace a data set that this command made")


@dataclass
class CheckConfig(SplitOptions):
    """Every option of `ca3d data check`.

    Example:
        >>> CheckConfig("videos").quick
        False
    """

    data: str = option("", "Folder with one sub-folder of videos per class", positional=True)
    quick: bool = option(False, "Decode the first frame of every video only")
    frames: int = option(16, "Frames in a clip")
    stride: int = option(2, "Frames from one sampled frame to the next")
    fps: float | None = option(None, "Frame rate that the stride counts in")
    json: bool = option(False, "Print JSON")
    workers: int = option(2, "Videos read at a time")
    decoder: Literal["auto", "av", "torchcodec"] = option("auto", "Video decoder")


@dataclass
class CacheConfig:
    """Every option of `ca3d data cache`.

    Example:
        >>> CacheConfig("videos").short_side
        128
    """

    data: str = option("", "Folder with one sub-folder of videos per class", positional=True)
    out: str | None = option(None, "Folder of the cache (default: inside DATA)")
    short_side: int = option(128, "Shorter side of the stored frames in pixels")
    format: Literal["jpeg", "npy"] = option("jpeg", "How frames are stored")
    workers: int = option(2, "Processes")
    decoder: Literal["auto", "av", "torchcodec"] = option("auto", "Video decoder")


@dataclass
class SplitConfig(SplitOptions):
    """Every option of `ca3d data split`.

    Example:
        >>> SplitConfig("videos").val
        0.15
    """

    data: str = option("", "Folder with one sub-folder of videos per class", positional=True)
    out: str | None = option(None, "Folder of train.csv, val.csv and test.csv (default: DATA)")
    val: float = option(0.15, "Share of the videos for validation")
    test: float = option(0.15, "Share for testing")
    group: str | None = option(
        None,
        "What keeps files together: a regular expression on file names whose (...) names the"
        " recording or person, or a column of --list-file",
    )
    list_file: str | None = option(
        None, "CSV or JSON-lines file of the videos to divide (path,label), not the folders"
    )
    seed: int = option(0, "Seed of the draw")
    force: bool = option(False, "Replace split files that are there")


@dataclass
class ListConfig:
    """Every option of `ca3d data list`: none.

    Example:
        >>> ListConfig()
        ListConfig()
    """


@dataclass
class InfoConfig:
    """Every option of `ca3d info`.

    Example:
        >>> InfoConfig().path is None
        True
    """

    path: str | None = option(None, "Weights file, run folder, data set or video", positional=True)
    models: bool = option(False, "List the models")
    json: bool = option(False, "Print JSON")
