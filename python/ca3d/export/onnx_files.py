"""Writing graphs as ONNX files, in float32, float16 or int8."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ca3d import weights
from ca3d.export.packages import import_extra, quiet
from ca3d.files import write_atomically

__all__ = ["OPSET", "quantize", "write"]

# The newest that ONNX Runtime of the last two years reads, with all that CA3D needs.
OPSET = 18
_PLACE = "pkg.torch.onnx.class_hierarchy"


def write(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: list[str],
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    """Exports a module with fixed shapes by torch's dynamo exporter.

    Args:
        module: in evaluation mode.
        inputs: an example of each input, by its name, in the order of `forward`.
        outputs: names of the outputs.
        path: the file, one without external data.
        metadata: strings by name, for the file's `metadata_props`.

    Raises:
        ca3d.errors.UserError: a package of the extra `onnx` is missing.
    """
    onnx = import_extra("onnx", "onnx")
    import_extra("onnxscript", "onnx")
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        # The exporter's notes hold the paths of this machine; the place in the model is kept.
        kept = [(x.key, x.value) for x in node.metadata_props if x.key == _PLACE]
        del node.metadata_props[:]
        onnx.helper.set_model_props(node, dict(kept))
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def quantize(
    source: Path, path: Path, batches: Iterable[Mapping[str, np.ndarray]], metadata: Any
) -> None:
    """Quantizes a float32 file to int8: static, QDQ, weights per channel.

    Convolutions and the sums between them are int8; the temporal halves (6 % of the
    multiply-adds), the pools and the classifier stay in float32.

    Args:
        source: a file from `write`.
        path: the file to write.
        batches: inputs by name, whose ranges become the scales of the activations.
        metadata: strings by name, for the file's `metadata_props`.

    Raises:
        ca3d.errors.UserError: a package of the extra `onnx` is missing.
    """
    onnx = import_extra("onnx", "onnx")
    quantization = import_extra("onnxruntime.quantization", "onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter(batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    model = onnx.load(source)
    left_out = [node.name for node in model.graph.node if _is_temporal(node)]

    def run(temporary: Path) -> None:
        with quiet():
            quantization.quantize_static(
                model,
                temporary,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Add", "Relu"],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=left_out,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
        quantized = onnx.load(temporary)
        onnx.helper.set_model_props(quantized, dict(metadata))
        temporary.write_bytes(quantized.SerializeToString())

    write_atomically(path, run)


def metadata_of(info: weights.ModelInfo, part: str, **more: Any) -> dict[str, str]:
    """The metadata of an exported file: what a weights file says, and which part this is.

    Args:
        info: of the model.
        part: name of the graph.
        **more: further values, such as precision and stride.

    Example:
        >>> metadata_of(weights.ModelInfo("ca3d", {}), "clip", stride=1)["ca3d.part"]
        'clip'
    """
    values = {"version": weights.VERSION, "part": part, **more}
    found = {f"ca3d.{name}": str(value) for name, value in values.items()}
    return {**found, "ca3d.info": json.dumps(asdict(info))}


def _is_temporal(node: Any) -> bool:
    """Whether a node comes from a temporal half (`ca3d.export.graphs._Lines`)."""
    return any("_Lines" in entry.value for entry in node.metadata_props if entry.key == _PLACE)
