"""The options of `ca3d export`."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ca3d.errors import UserError
from ca3d.options import option

__all__ = ["FORMATS", "PRECISIONS", "ExportConfig"]

FORMATS = ("onnx", "executorch")
PRECISIONS = ("float32", "float16", "int8")


@dataclass
class ExportConfig:
    """Every option of `ca3d export`; `ca3d export --help` prints what each of them means.

    Example:
        >>> ExportConfig("onnx", "runs/mine", "exported", precision="int8").validate()
        Traceback (most recent call last):
        ca3d.errors.UserError: --precision int8 needs --calibration DATA, videos like those that \
the model was trained on
    """

    format: str = option("", "onnx or executorch", "Export", positional=True)
    weights: str = option(
        "", "Weights file (.safetensors) or run folder", "Export", positional=True
    )
    out: str = option("", "Folder for the files", "Export")
    precision: Literal["float32", "float16", "int8"] = option(
        "float32", "Of weights and activations; int8 is ONNX only", "Export"
    )
    stream: bool = option(
        False, "Also the two graphs of exact streaming, encoder and head (ONNX only)", "Export"
    )
    stride: int = option(1, "Frames from one window of the stream to the next", "Export")
    size: int | None = option(
        None, "Height and width of the frames (default: the model's)", "Export"
    )
    force: bool = option(False, "Replace files that are there", "Export")
    calibration: str | None = option(
        None, "Data set whose training clips set the ranges of int8", "int8"
    )
    calibration_clips: int = option(64, "How many of its clips", "int8")
    rounds: int = option(5, "Timed runs of each side", "Comparison")
    threads: int = option(2, "Threads of each side", "Comparison")
    check_data: str | None = option(
        None, "Data set on whose clips both accuracies are measured, in pairs", "Comparison"
    )
    check_split: Literal["train", "val", "test", "all"] = option(
        "test", "Which split of it", "Comparison"
    )
    check_clips: int = option(2000, "At least so many clips", "Comparison")
    decoder: Literal["auto", "av", "torchcodec"] = option("auto", "Video decoder", "Comparison")
    json: bool = option(False, "Print the comparison as JSON", "Comparison")

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        if self.format not in FORMATS:
            raise UserError(f"FORMAT must be one of {', '.join(FORMATS)}, not {self.format!r}")
        for name in ("calibration_clips", "rounds", "threads", "check_clips", "stride", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.precision not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise UserError(f"--precision must be one of {allowed}, not {self.precision!r}")
        if self.format == "executorch":
            if self.precision == "int8":
                raise UserError("--precision int8 is for ONNX only; ExecuTorch: float32, float16")
            if self.stream:
                raise UserError("--stream is for ONNX only; ExecuTorch runs whole clips")
        if self.precision == "int8" and self.calibration is None:
            raise UserError(
                "--precision int8 needs --calibration DATA, videos like those that the model was "
                "trained on"
            )
