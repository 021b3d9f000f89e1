"""Streaming against whole clips, and int8 against float32 in ONNX Runtime.

Models have random weights; int8 is calibrated on noise, which does not change its speed. Its
accuracy is measured by `ca3d export onnx --precision int8 --check-data`, on videos.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import interleave

import ca3d
from ca3d.edge_bench import BenchConfig, make_candidates
from ca3d.models import create
from ca3d.streaming import Stream

CLASSES, FRAMES, SIZE, THREADS = 101, 16, 112, 2
GROUP = "edge: one window of 16x112x112, float32"


@pytest.mark.benchmark(group=GROUP)
@pytest.mark.parametrize("preset", [None, "published"], ids=["paper", "published"])
def test_streaming(benchmark: Any, preset: str | None) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = create("ca3d", CLASSES, preset=preset).eval()
    video = torch.randn(3, FRAMES, SIZE, SIZE)

    def clip(model: Any) -> Any:
        return lambda: model(video[None])

    def step(model: Any, stride: int) -> Any:
        stream, new = Stream(model, stride), video[:, :stride].contiguous()
        stream.push(video)
        return lambda: stream.push(new)

    runs = {}
    for kind, chosen in (("", model), ("fused ", ca3d.fuse(model))):
        runs[f"{kind}clip"] = clip(chosen)
        runs |= {f"{kind}stream by {s}": step(chosen, s) for s in (1, 2, 4)}
    with torch.no_grad():
        timings = interleave(runs, rounds=15, warmup=2, budget=24)
    for s in (1, 2, 4):
        # As `ca3d watch` streams, over what it would take to run the model on every window.
        for name, other in (
            (f"stream by {s}", "clip"),
            (f"fused stream by {s}", "fused clip"),
            (f"fused stream by {s}", "clip"),
        ):
            benchmark.extra_info[f"{name} / {other}, time"] = round(timings.ratio(name, other), 3)
    benchmark.pedantic(runs["fused stream by 1"], rounds=3)


@pytest.mark.benchmark(group=GROUP)
def test_onnx_runtime(benchmark: Any, tmp_path: Path) -> None:
    config = BenchConfig("edge", peers="", runtimes="torch,onnx", strides="1")
    candidates = make_candidates(config, tmp_path)
    torch.set_num_threads(THREADS)
    runs = {
        f"{c.runtime} {c.precision} {'clip' if c.stride is None else 'stream'}": c.load(THREADS)[0]
        for c in candidates
    }
    timings = interleave(runs, rounds=15, warmup=2, budget=12)
    for name, other in (
        ("onnx float32 clip", "onnx int8 clip"),
        ("onnx float32 clip", "torch float32 clip"),
        ("onnx float32 stream", "onnx float32 clip"),
        ("onnx int8 stream", "onnx int8 clip"),
        ("onnx int8 stream", "torch float32 stream"),
    ):
        ratio = timings.ratio(name, other)
        benchmark.extra_info[f"{name} / {other}, time"] = round(ratio, 3)
    benchmark.pedantic(runs["onnx int8 clip"], rounds=3)
