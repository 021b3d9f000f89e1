"""A training step of CA3D against the plain version in peers_model.py: frames/s and peak memory.

Both models have the published pool placement, attention and weights; ours runs in several precision
regimes of `ca3d.precision`. Times are medians over interleaved rounds (see interleaved.py); a step
is forward, backward and SGD. Peak memory is the
growth of the process's largest resident size over three steps, from what it was with the model, the
input and the optimizer built and the convolution library warm on a tiny clip; every measurement has
a process of its own, and transient memory (unfolded windows, copies) counts as it does in use. All
are measured twice: with freed memory kept by the C library, as it does by itself, and returned to
the system, as `ca3d train --precision float16` has it (`ca3d.precision.return_freed_memory`).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import interleaved
import pytest
import torch
import torch.nn.functional as F
from interleaved import Timings, interleave
from peers_model import PlainCA3D
from torch import nn

from ca3d import precision
from ca3d.models import create
from ca3d.models.published import entries

CLASSES, FRAMES, SIZE = 101, 16, 112

MEASURE = r"""
import json, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_model

def resident(largest):
    # Not getrusage: its maximum starts at the size of the process that started this one.
    field = r"VmHWM:\s*(\d+) kB" if largest else r"VmRSS:\s*(\d+) kB"
    return int(re.search(field, Path("/proc/self/status").read_text())[1]) * 1024

if sys.argv[3] == "returned":
    test_model.precision.return_freed_memory()
step, warm = test_model.both_steps(sys.argv[2], *map(int, sys.argv[4:]))
warm()
before = resident(largest=False)
for _ in range(3):
    step()
print(json.dumps(resident(largest=True) - before))
"""


def clips() -> tuple[int, int]:
    """Clips of a training step, and their height; with `--quick` enough to show that it runs."""
    return (4, SIZE) if interleaved.most_rounds > 1 else (2, 32)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if name == "peer":
        return PlainCA3D(CLASSES, FRAMES)
    return create("ca3d", CLASSES, preset="published", frames=FRAMES)


def training_step(
    model: nn.Module, batch: int, size: int, regime: precision.Regime | None = None
) -> Any:
    """A step of a model that is prepared for its regime; plain float32 without one."""
    clip, labels = torch.randn(batch, 3, FRAMES, size, size), torch.arange(batch)
    parameters = list(model.parameters())
    if regime is not None:
        optimizer = regime.optimizer("sgd", parameters, lr=1e-3, weight_decay=5e-3)

        def step_in_regime() -> None:
            regime.backward(regime.loss(regime.forward(model, clip), labels))
            regime.step(optimizer, parameters)

        return step_in_regime
    plain = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-3)

    def step() -> None:
        plain.zero_grad()
        F.cross_entropy(model(clip), labels).backward()
        plain.step()

    return step


def in_regime(name: str) -> tuple[nn.Module, precision.Regime | None]:
    """The peer, or our model in a regime."""
    if name == "peer":
        return build("peer"), None
    regime = precision.create(name)
    return regime.prepare(build("ours")), regime


def both_steps(name: str, batch: int, size: int) -> tuple[Any, Any]:
    """A training step of ordinary and one of tiny clips, of one model."""
    model, regime = in_regime(name)
    return (
        training_step(model, batch, size, regime),
        training_step(model, 2, 16, regime),
    )


def inference(model: nn.Module) -> Any:
    size = clips()[1]
    clip = torch.randn(1, 3, FRAMES, size, size)

    @torch.no_grad()
    def run() -> None:
        model(clip)

    model.eval()
    return run


def report(benchmark: Any, timings: Timings, frames: int) -> None:
    """Writes frames/s of both models, and their ratio, into the benchmark's record."""
    for name in ("ours", "peer"):
        speed = frames / timings.median(name)
        benchmark.extra_info[f"{name}_frames_per_second"] = round(speed, 2)
    ratio = round(timings.ratio("peer", "ours"), 2)
    benchmark.extra_info["ours_over_peer_frames_per_second"] = ratio


def test_same_function() -> None:
    """The peer computes what our model computes: the ratios compare like with like."""
    ours = create("ca3d", CLASSES, preset="published", frames=4).double().eval()
    peer = PlainCA3D(CLASSES, frames=4).double().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.uniform_(-0.1, 0.1)
    state = peer.state_dict()
    ours.load_state_dict({e.ours: e.convert(state[e.published]) for e in entries(ours)})
    clip = torch.randn(1, 3, 4, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), peer(clip))


@pytest.mark.benchmark(group="model: training step, batch 4, 16x112x112, float32")
def test_training_step(benchmark: Any) -> None:
    steps = {name: training_step(build(name), *clips()) for name in ("ours", "peer")}
    timings = interleave(steps, rounds=5, warmup=1, budget=120)
    report(benchmark, timings, clips()[0] * FRAMES)
    benchmark.pedantic(steps["ours"], rounds=1)


@pytest.mark.benchmark(group="model: training step by regime, batch 4, 16x112x112")
def test_training_step_by_regime(benchmark: Any) -> None:
    names = ["float32", "float16"]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names.append("bfloat16")
    steps = {name: both_steps(name, *clips())[0] for name in names}
    timings = interleave(steps, rounds=5, warmup=1, budget=120)
    for name in names[1:]:
        ratio = timings.ratio(name, "float32")
        benchmark.extra_info[f"{name}_over_float32_time"] = round(ratio, 2)
    benchmark.pedantic(steps["float16"], rounds=1)


@pytest.mark.benchmark(group="model: training step, batch 4, 8x32x32, float16")
def test_training_step_against_torchs_float16(benchmark: Any) -> None:
    """torch's own float16 is the same model without half storage, its kernels and `PreParamSGD`."""
    clip, labels = torch.randn(4, 3, 8, 32, 32), torch.arange(4)
    plain = PlainCA3D(CLASSES, 8).half()
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-3)

    def torchs() -> None:
        sgd.zero_grad()
        (F.cross_entropy(plain(clip.half()).float(), labels) * 128).backward()
        sgd.step()

    regime = precision.create("float16")
    model = regime.prepare(create("ca3d", CLASSES, preset="published", frames=8))
    parameters = list(model.parameters())
    optimizer = regime.optimizer("sgd", parameters, lr=1e-3, weight_decay=5e-3)

    def ours() -> None:
        regime.backward(regime.loss(regime.forward(model, clip), labels))
        regime.step(optimizer, parameters)

    timings = interleave({"ours": ours, "torch": torchs}, rounds=3, warmup=1, budget=60)
    benchmark.extra_info["torch_over_ours_time"] = round(timings.ratio("torch", "ours"), 1)
    benchmark.pedantic(ours, rounds=1)


@pytest.mark.benchmark(group="model: inference, batch 1, 16x112x112, float32")
def test_inference(benchmark: Any) -> None:
    runs = {name: inference(build(name)) for name in ("ours", "peer")}
    timings = interleave(runs, rounds=7, warmup=1, budget=60)
    report(benchmark, timings, FRAMES)
    benchmark.pedantic(runs["ours"], rounds=1)


@pytest.mark.benchmark(group="model: peak memory of a training step, batch 4, 16x112x112")
def test_peak_memory(benchmark: Any) -> None:
    def measure(name: str, freed: str) -> int:
        here = str(Path(__file__).parent)
        command = [sys.executable, "-c", MEASURE, here, name, freed, *map(str, clips())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(json.loads(done.stdout.splitlines()[-1]))

    ways = ("returned", "kept")
    for freed in ways[:1] if interleaved.most_rounds == 1 else ways:
        peer = measure("peer", freed)
        benchmark.extra_info[f"peer_peak_bytes_{freed}"] = peer
        for name in ("float32", "float16"):
            ours = measure(name, freed)
            benchmark.extra_info[f"{name}_peak_bytes_{freed}"] = ours
            benchmark.extra_info[f"{name}_over_peer_peak_{freed}"] = round(ours / peer, 3)
    benchmark.pedantic(lambda: None, rounds=1)
