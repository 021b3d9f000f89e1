"""Parameters and multiply-adds of the baselines, against measured and published figures."""

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ca3d.models import count_macs, create

CLIP = (1, 3, 16, 112, 112)


def on_meta(name: str, num_classes: int = 101, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, num_classes, **options)


@functools.cache
def _cost(name: str, num_classes: int, options: tuple[tuple[str, Any], ...]) -> tuple[int, float]:
    model = on_meta(name, num_classes, **dict(options))
    return sum(p.numel() for p in model.parameters()), count_macs(model, CLIP)["total"] / 1e9


def parameters(name: str, num_classes: int = 101, **options: Any) -> int:
    return _cost(name, num_classes, tuple(options.items()))[0]


def gmac(name: str, **options: Any) -> float:
    return _cost(name, 101, tuple(options.items()))[1]


# Measured once of the libraries' own classes (of X3D, pytorchvideo's), 101 classes, 16x112x112.
@pytest.mark.parametrize(
    ("name", "options", "million", "billion"),
    [
        ("r3d_18", {}, 33.22, 40.70),
        ("r2plus1d_18", {}, 31.35, 40.52),
        ("r2plus1d_18_15m", {}, 15.42, 19.35),
        ("x3d_xl", {}, 10.48, 4.80),
        ("timesformer_b", {}, 121.23, 96.27),
        ("swin3d_t", {"patch": (2, 4, 4), "window": (8, 7, 7)}, 27.93, 11.36),
        ("vivit_2", {}, 130.07, 17.85),
        ("tubevit_b", {}, 85.43, 26.76),
    ],
)
def test_library_figures(
    name: str, options: dict[str, Any], million: float, billion: float
) -> None:
    assert parameters(name, **options) / 1e6 == pytest.approx(million, abs=0.005)
    assert gmac(name, **options) == pytest.approx(billion, abs=0.006)


# Of the published classes, by torch's counter (half its flops). TubeViT's was counted without its
# attention, which is fused there; 226,560 of its parameters are the fixed positional table.
@pytest.mark.parametrize(
    ("name", "count", "billion"),
    [
        ("i3d", 12_390_789, 13.97 / 2),
        ("x3d_xl", 10_483_253, 9.61 / 2),
        ("stam_b", 118_861_157, 139.42 / 2),
        ("swin3d_t", 27_657_491, 9.79 / 2),
        ("tubevit_b", 85_433_190, None),
    ],
)
def test_equal_to_the_published_models(name: str, count: int, billion: float | None) -> None:
    assert parameters(name) == count
    if billion is not None:
        assert gmac(name) == pytest.approx(billion, abs=0.005)


def test_x3d_at_400_classes() -> None:
    assert sum(p.numel() for p in on_meta("x3d_xl", 400).parameters()) == 11_095_904


# What our variants have more or less than the published ones; docs/models.md says why.
@pytest.mark.parametrize(
    ("name", "published", "more"),
    [
        ("timesformer_b", 121_228_901, 768),
        ("vivit_2", 130_134_629, -89 * 768),
        ("r3d_18", 33_227_557, -9_472),
        ("r2plus1d_18", 33_239_882, -1_887_944),
        ("r2plus1d_18_15m", 14_123_876, 1_295_986),
    ],
)
def test_differences_from_the_published_models(name: str, published: int, more: int) -> None:
    assert parameters(name) == published + more


@pytest.mark.parametrize("name", ["r3d_tiny", "r2plus1d_tiny", "x3d_tiny", "timesformer_tiny"])
def test_tiny_models_cost_as_much_as_ca3d_tiny(name: str) -> None:
    clip = (1, 3, 16, 32, 32)
    ours = count_macs(on_meta("ca3d_tiny", 30), clip)["total"]
    assert count_macs(on_meta(name, 30), clip)["total"] / ours == pytest.approx(1, abs=0.05)


# ---- what torch's counter misses on a CPU ----


def naive_gmac(model: nn.Module, clip: tuple[int, ...]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(clip))
    return counter.get_total_flops() / 2


def test_fused_attention_is_counted() -> None:
    clip, width, depth = (1, 3, 16, 32, 32), 48, 4
    model = create("tubevit_tiny", 5)
    tokens = len(model.features.tubes.positions) + 1
    counts = count_macs(model, clip)
    assert counts["bmm"] == depth * 2 * tokens**2 * width
    assert naive_gmac(model, clip) == counts["total"] - counts["bmm"]


def test_the_fast_path_of_transformers_is_counted() -> None:
    clip, frames, width, hidden, depth = (1, 3, 16, 32, 32), 16, 48, 128, 2
    model = create("stam_tiny", 5)
    linear = depth * (frames + 1) * width * (4 * width + 2 * hidden)
    attention = 2 * depth * (frames + 1) ** 2 * width
    encoder = model.features.temporal
    missed = count_macs(model, clip)["total"] - naive_gmac(model, clip)
    assert missed >= linear + attention
    alone = nn.Sequential(
        nn.Flatten(2), nn.Linear(1024, width), encoder
    )  # a clip's frames as tokens
    counts = count_macs(alone, (1, frames + 1, 1, 32, 32))
    assert counts["total"] == (frames + 1) * 1024 * width + linear + attention
    assert torch.backends.mha.get_fastpath_enabled()
