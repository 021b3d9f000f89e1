"""Running exported files with ONNX Runtime: clips, and streams whose state is kept here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ca3d import weights
from ca3d.errors import UserError
from ca3d.export import STREAM_FILES, file_name
from ca3d.export.packages import import_extra

__all__ = ["OnnxClassifier", "OnnxGraph", "OnnxStream"]


class OnnxGraph:
    """One file of `ca3d export onnx`, ready to run on the CPU.

    Args:
        path: the file.
        threads: of one run; None leaves the choice to ONNX Runtime.

    Attributes:
        info: what the file says of its model.
        part: ``"clip"``, ``"encoder"`` or ``"head"``.
        precision: ``"float32"``, ``"float16"`` or ``"int8"``.
        stride: of the stream that the file was exported for, or None.
        inputs: shape of each input, by name.

    Raises:
        ca3d.errors.UserError: no such file, not from `ca3d export`, or ONNX Runtime is missing.

    Example:
        >>> OnnxGraph("missing.onnx")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.onnx: no such file
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        onnxruntime = import_extra("onnxruntime", "onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: ONNX Runtime can't read it: {reason}") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "ca3d.info" not in metadata or "ca3d.part" not in metadata:
            raise UserError(f"{path}: an ONNX file, but not one of `ca3d export`")
        if metadata.get("ca3d.version") != str(weights.VERSION):
            raise UserError(
                f"{path}: has format version {metadata.get('ca3d.version')}, this ca3d reads "
                f"{weights.VERSION}"
            )
        try:
            self.info = weights.ModelInfo(**json.loads(metadata["ca3d.info"]))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: its description is damaged: {error}") from error
        self.part = metadata["ca3d.part"]
        self.precision = metadata.get("ca3d.precision", "float32")
        stride = metadata.get("ca3d.stride")
        self.stride = None if stride is None else int(stride)
        found = self._session.get_inputs()
        self.inputs = {x.name: tuple(x.shape) for x in found}
        self.dtypes = {
            x.name: np.float16 if x.type == "tensor(float16)" else np.float32 for x in found
        }

    def run(self, **inputs: np.ndarray) -> list[Any]:
        """Computes the outputs, in their order.

        Args:
            **inputs: arrays by name.
        """
        outputs: list[Any] = self._session.run(None, inputs)
        return outputs


class OnnxClassifier(nn.Module):
    """A whole clip by ONNX Runtime, in the place of the model it was exported from.

    Args:
        path: a clip file of `ca3d export onnx`, or its folder.
        threads: see `OnnxGraph`.

    Attributes:
        info: what the file says of its model, for `ca3d.predict.Predictor`.

    Raises:
        ca3d.errors.UserError: as `OnnxGraph`; also another part of a model.

    Example:
        >>> OnnxClassifier("missing")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing: no such file or folder
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        super().__init__()
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_dir():
            path = path / file_name("clip")
        self.graph = OnnxGraph(path, threads)
        if self.graph.part != "clip":
            raise UserError(
                f"{path}: the {self.graph.part} of a stream, not a model of whole clips "
                f"({file_name('clip')})"
            )
        self.info = self.graph.info
        (self._name, self._shape), *_ = self.graph.inputs.items()

    def forward(self, clips: Tensor) -> Tensor:
        """Maps normalised clips (B, 3, T, H, W) to logits (B, classes), float32.

        Raises:
            ValueError: clips of another size than the file's, whose shapes are fixed.
        """
        if clips.dim() != 5 or (clips.shape[2], clips.shape[1], *clips.shape[3:]) != self._shape:
            frames, channels, height, width = self._shape
            raise ValueError(
                f"clips must be (batch, {channels}, {frames}, {height}, {width}) as the file was "
                f"exported, got {tuple(clips.shape)}"
            )
        images = clips.detach().cpu().float().transpose(1, 2).contiguous().numpy()
        logits = [self.graph.run(**{self._name: clip})[0] for clip in images]
        return torch.from_numpy(np.concatenate(logits)) if logits else torch.empty(0, 0)


class OnnxStream:
    """`ca3d.Stream` by ONNX Runtime: the encoder once a frame (or pair), the head once a window.

    The state is what the graphs take and return, kept here in order of time.

    Args:
        folder: of ``ca3d export onnx --stream``.
        stride: frames from one window to the next; None is the stride of the export. A stream that
            was exported for an even stride takes even ones only.
        threads: see `OnnxGraph`.

    Attributes:
        info: what the files say of their model.
        frames_seen: frames pushed so far.

    Raises:
        ca3d.errors.UserError: the files are missing, not of one export, or don't allow the stride.

    Example:
        >>> OnnxStream("missing")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing: holds no stream (encoder.onnx, head.onnx); export it with \
--stream
    """

    def __init__(
        self, folder: str | Path, stride: int | None = None, threads: int | None = None
    ) -> None:
        files = [Path(folder) / file_name(part) for part in STREAM_FILES]
        if not all(file.is_file() for file in files):
            names = ", ".join(file.name for file in files)
            raise UserError(f"{folder}: holds no stream ({names}); export it with --stream")
        self._encoder, self._head = (OnnxGraph(file, threads) for file in files)
        if self._encoder.info != self._head.info:
            raise UserError(f"{folder}: encoder and head are of different exports")
        self.info = self._head.info
        self.window = self.info.frames
        self.stride = (self._encoder.stride or 1) if stride is None else stride
        self._step, *self._size = (self._encoder.inputs["frames"][i] for i in (0, 2, 3))
        if not 1 <= self.stride <= self.window or self.stride % self._step:
            raise UserError(
                f"stride must be from 1 to {self.window} frames"
                f"{' and even' if self._step > 1 else ''}, got {self.stride}; the files in "
                f"{folder} were exported for stride {self._encoder.stride}"
            )
        self._units = self._head.inputs["units"][0]
        self._spacing = self.window // self._units
        self.reset()

    def reset(self) -> None:
        """Forgets all frames."""
        self.frames_seen = 0
        self._waiting: np.ndarray | None = None
        self._last = None
        if "last" in self._encoder.inputs:
            self._last = np.zeros(self._encoder.inputs["last"], dtype=self._encoder.dtypes["last"])
        # Units of all phases in order of time; a window takes every `_apart`-th.
        self._apart = self._spacing // self._step
        length = (self._units - 1) * self._apart + 1
        shape = (length, *self._head.inputs["units"][1:])
        self._ring = np.zeros(shape, dtype=self._head.dtypes["units"])

    @property
    def memory_bytes(self) -> int:
        """Bytes of the state."""
        return self._ring.nbytes + (0 if self._last is None else self._last.nbytes)

    def push(self, frames: Tensor) -> Tensor | None:
        """Takes the next frames; see `ca3d.Stream.push`.

        Args:
            frames: (3, n, H, W), normalised, floating, of the size of the export.

        Returns:
            Logits (classes,), float32, of the newest window that became due, or None.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: another shape.
        """
        if not isinstance(frames, Tensor) or not frames.is_floating_point():
            kind = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
            raise TypeError(f"frames must be a floating-point tensor (normalised), got {kind}")
        height, width = self._size
        if frames.dim() != 4 or frames.shape[0] != 3 or not frames.shape[1]:
            raise ValueError(
                f"frames must be (3, frames, height, width), got {tuple(frames.shape)}"
            )
        if tuple(frames.shape[2:]) != (height, width):
            raise ValueError(
                f"frames must have the {height} x {width} pixels of the export, got "
                f"{tuple(frames.shape[2:])}"
            )
        due = None
        for image in _images(frames):
            self._encode(image)
            behind = self.frames_seen - self.window
            if behind >= 0 and behind % self.stride == 0:
                due = self._window()
        if due is None:
            return None
        return torch.from_numpy(self._head.run(units=due)[0][0])

    def inputs_of(self, clip: Tensor, part: str) -> Iterator[dict[str, np.ndarray]]:
        """What a part is given while a clip streams through, for calibration.

        Args:
            clip: (3, T, H, W), a whole window.
            part: ``"encoder"``, which gives a few of its inputs, or ``"head"``.
        """
        self.reset()
        for number, image in enumerate(_images(clip)):
            inputs = self._encode(image)
            if part == "encoder" and inputs is not None and number % 5 in (3, 4):
                yield inputs
        if part == "head":
            yield {"units": self._window()}

    def _window(self) -> np.ndarray:
        return self._ring[:: self._apart].copy()

    def _encode(self, frame: np.ndarray) -> dict[str, np.ndarray] | None:
        """Takes one frame (1, 3, H, W); returns what the encoder was given, if it was its turn."""
        self.frames_seen += 1
        if self._waiting is not None:
            frame, self._waiting = np.concatenate([self._waiting, frame]), None
        elif self._step > 1:
            self._waiting = frame
            return None
        inputs = {"frames": frame}
        if self._last is not None:
            inputs["last"] = self._last
        unit, *last = self._encoder.run(**inputs)
        if last:
            self._last = last[0]
        self._ring[:-1] = self._ring[1:]
        self._ring[-1] = unit[0]
        return inputs


def _images(clip: Tensor) -> Iterator[np.ndarray]:
    """The frames of (3, T, H, W), each (1, 3, H, W) float32."""
    frames = clip.detach().cpu().float().transpose(0, 1).contiguous().numpy()
    yield from (frame[None] for frame in frames)
