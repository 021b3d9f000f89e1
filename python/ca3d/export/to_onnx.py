"""The ONNX side of `ca3d export`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ca3d
from ca3d import weights
from ca3d.export import file_name
from ca3d.export.graphs import AnyClip, graphs_of
from ca3d.export.onnx_files import metadata_of, quantize
from ca3d.export.onnx_files import write as write_file
from ca3d.export.onnx_runtime import OnnxClassifier, OnnxStream
from ca3d.export.options import ExportConfig
from ca3d.models.fused import FusedCA3D

__all__ = ["classifier", "write"]


def write(
    config: ExportConfig,
    model: nn.Module,
    info: weights.ModelInfo,
    clips: list[Tensor],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Writes the files of an export.

    Args:
        config: the options.
        model: in float32.
        info: of the model.
        clips: (3, T, H, W) for calibration.
        folder: where to.
        say: called with a line about what is being done.
    """
    fused = ca3d.fuse(model, portable=True)
    if config.precision == "float16":
        fused = fused.half()
    stride = config.stride if config.stream else None
    more = {"precision": config.precision, **({} if stride is None else {"stride": stride})}
    if isinstance(fused, FusedCA3D):
        graphs = graphs_of(fused, info.size, stride)
    else:
        frames = torch.zeros(info.frames, 3, info.size, info.size)
        graphs = {"clip": (AnyClip(fused), {"frames": frames}, ["logits"])}
    for part, (module, inputs, outputs) in graphs.items():
        say(f"tracing {file_name(part)}")
        metadata = metadata_of(info, part, **more)
        write_file(module, inputs, outputs, folder / file_name(part), metadata)
    if config.precision != "int8":
        return
    wide = {part: folder / f"float32-{file_name(part)}" for part in graphs}
    stream = None
    if stride is not None:
        stream = OnnxStream(folder, threads=config.threads)
    for part, path in wide.items():
        (folder / file_name(part)).rename(path)
    for part, path in wide.items():
        say(f"calibrating {file_name(part)} on {len(clips)} clips")
        inputs_of = _inputs(clips, part, stream)
        quantize(path, folder / file_name(part), inputs_of, metadata_of(info, part, **more))


def classifier(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """Returns a function from clips (B, 3, T, H, W) to logits (B, classes).

    Args:
        path: the exported clip file.
        threads: of a run.
    """
    return OnnxClassifier(path, threads)


def _inputs(
    clips: list[Tensor], part: str, stream: OnnxStream | None
) -> Iterator[Mapping[str, Any]]:
    for clip in clips:
        if part == "clip":
            yield {"frames": clip.transpose(0, 1).contiguous().numpy()}
        else:
            assert stream is not None
            yield from stream.inputs_of(clip, part)
