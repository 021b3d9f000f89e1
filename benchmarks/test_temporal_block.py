"""How long a fused model and its temporal halves take, against the modules they were made of.

`ca3d.fuse` of CA3D and CA3D-L, in inference at batch 1, 16x112x112; the temporal halves alone on
features of their blocks. ONNX Runtime takes part where it and the exporter can be imported. The
ratios are medians over interleaved rounds (see interleaved.py).
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from interleaved import Timings, interleave
from torch import Tensor, nn

import ca3d
from ca3d import models

# Channels, frames and side of the features that enter the temporal halves.
BLOCKS = {"block 3": ("temporal3", 256, 8, 14), "block 4": ("temporal4", 512, 4, 7)}
MODELS = {
    "CA3D": ("ca3d", {}),
    "CA3D, published": ("ca3d", {"preset": "published"}),
    "CA3D-L": ("ca3d_l", {}),
}


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A model and its fused copy."""
    kind, options = MODELS[name]
    model = models.create(kind, 101, **options).eval().requires_grad_(False)
    return model, ca3d.fuse(model)


def clip(channels: int, frames: int, side: int) -> Tensor:
    x = torch.randn(1, channels, frames, side, side)
    return x.contiguous(memory_format=torch.channels_last_3d)


@cache
def halves(name: str, block: str) -> dict[str, Callable[[], object]]:
    model, fused = pair(name)
    layer, channels, frames, side = BLOCKS[block]
    x = clip(channels, frames, side)

    def modules() -> Tensor:
        # The positional table, which the fused half contains, stands before the first half.
        y = model.layers["position"](x) if layer == "temporal3" else x
        return model.layers[layer](y)

    return {"fused": lambda: fused.layers[layer](x), "modules": modules}


@cache
def half_timings(name: str, block: str) -> Timings:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with torch.inference_mode():
        return interleave(halves(name, block), rounds=60, budget=3.0)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
def test_temporal_half(benchmark: Any, name: str, block: str) -> None:
    measured = half_timings(name, block)
    benchmark.extra_info["modules / time"] = round(measured.ratio("modules", "fused"), 2)
    with torch.inference_mode():
        benchmark.pedantic(halves(name, block)["fused"], rounds=3, warmup_rounds=1)


def onnx_runtime(model: nn.Module, x: Tensor) -> Callable[[], object] | None:
    """The fused model as `ca3d export onnx` writes it, with as many threads as torch has."""
    wanted = ("onnx", "onnxscript", "onnxruntime")
    if any(importlib.util.find_spec(module) is None for module in wanted):
        return None
    import onnxruntime

    from ca3d.export.graphs import graphs_of
    from ca3d.export.onnx_files import write

    module, inputs, outputs = graphs_of(ca3d.fuse(model, portable=True), x.shape[-1])["clip"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        write(module, inputs, outputs, file, {})
        session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    (name,) = inputs
    feed = {name: x[0].transpose(0, 1).contiguous().numpy()}
    return lambda: session.run(None, feed)


@cache
def whole(name: str) -> dict[str, Callable[[], object]]:
    model, fused = pair(name)
    x = clip(3, 16, 112)
    candidates: dict[str, Callable[[], object]] = {
        "fused": lambda: fused(x),
        "model": lambda: model(x),
    }
    if session := onnx_runtime(model, x):
        candidates["ONNX Runtime"] = session
    return candidates


@cache
def model_timings(name: str) -> Timings:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    candidates = whole(name)
    with torch.inference_mode():
        return interleave(candidates, rounds=20, budget=12.0, pause=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark: Any, name: str) -> None:
    measured = model_timings(name)
    for other in set(measured.seconds) - {"fused"}:
        benchmark.extra_info[f"{other} / time"] = round(measured.ratio(other, "fused"), 2)
    with torch.inference_mode():
        benchmark.pedantic(whole(name)["fused"], rounds=3, warmup_rounds=1)
