"""CA3D against R3D-18, both as shipped: frames/s of a training step and of inference.

The paper's footprint table has 500 frames/s for CA3D and 360 for R3D-18, a ratio of 1.39. CA3D has
the published pool placement here, both run in float32 on a CPU and take turns (see interleaved.py).
`ca3d footprint --models all` measures all baselines.
"""

from typing import Any

import pytest
import torch
from interleaved import interleave

from ca3d.footprint import SHIPPED, FootprintConfig, Job

MODELS = {"ca3d": "ca3d:pool=published", "r3d_18": "r3d_18"}


@pytest.mark.benchmark(group="baselines: CA3D over R3D-18 as shipped, 16x112x112, float32")
@pytest.mark.parametrize(("kind", "run"), [("training", Job.train), ("inference", Job.infer)])
def test_frames_per_second(benchmark: Any, kind: str, run: Any) -> None:
    torch.set_num_threads(2)
    config = FootprintConfig(batch=4)
    clips = config.batch if kind == "training" else 1
    jobs = {
        name: Job(config, spec, "float32", SHIPPED, torch.device("cpu"))
        for name, spec in MODELS.items()
    }
    candidates = {name: lambda job=job: run(job) for name, job in jobs.items()}
    timings = interleave(candidates, rounds=7, warmup=1, budget=30)
    for name in jobs:
        speed = clips * config.frames / timings.median(name)
        benchmark.extra_info[f"{name}_{kind}_frames_per_second"] = round(speed, 2)
    ratio = round(timings.ratio("r3d_18", "ca3d"), 2)
    benchmark.extra_info[f"ca3d_over_r3d_18_{kind}_frames_per_second"] = ratio
    benchmark.pedantic(candidates["ca3d"], rounds=1)
