"""Parameters and multiply-adds of the baselines, against measured and published figures."""

from typing import Any

import pytest
import torch
from torch import nn

from ca3d.models import count_macs, create

CLIP = (1, 3, 16, 112, 112)


def on_meta(name: str, num_classes: int = 101, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, num_classes, **options)


# At 101 classes and 16x112x112: parameters, and GMAC as torch's counter has them.
@pytest.mark.parametrize(
    ("name", "options", "parameters", "gmac"),
    [
        ("r3d_18", {}, 33_218_085, 40.70),
        ("r2plus1d_18", {}, 31_351_938, 40.52),
        ("r2plus1d_18_15m", {}, 15_419_862, 19.35),
        ("x3d_m", {}, 3_181_671, 1.26),
        ("x3d_l", {}, 5_540_781, 2.45),
        ("x3d_xl", {}, 10_483_253, 4.80),
        ("timesformer_b", {}, 121_229_669, 96.27),
    ],
)
def test_library_versions(name: str, options: dict[str, Any], parameters: int, gmac: float) -> None:
    model = on_meta(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count_macs(model, CLIP)["total"] / 1e9 == pytest.approx(gmac, abs=0.005)


@pytest.mark.parametrize("name", ["r3d_tiny", "r2plus1d_tiny", "x3d_tiny", "timesformer_tiny"])
def test_tiny_models_cost_as_much_as_ca3d_tiny(name: str) -> None:
    clip = (1, 3, 16, 32, 32)
    ours = count_macs(on_meta("ca3d_tiny", 30), clip)["total"]
    assert count_macs(on_meta(name, 30), clip)["total"] / ours == pytest.approx(1, abs=0.05)
