"""`ca3d.fuse`: the same logits without normalisations, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ca3d
from ca3d import models
from ca3d.models.fused import FusedCA3D
from ca3d.models.norm import BatchNorm
from ca3d.precision import for_inference

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "published": {"preset": "published"},
    "published pool": {"pool": "published"},
    "shifted windows": {"edge": "shift", "kernel_size": 3},
    "zero edges": {"edge": "zero", "scale": "linear"},
    "dense projection": {"dense_qkv": True},
    "no columns": {"spatial_depths": (0, 0, 0, 0), "temporal_depths": (0, 0, 0, 0)},
    "no temporal halves": {"temporal_heads": (0, 0, 0, 0)},
    "attention everywhere": {"temporal_heads": (2, 2, 4, 8), "frames": 16},
    "one frame": {"frames": 1},
    "deep": {"spatial_depths": (1, 2, 3, 1), "temporal_depths": (0, 0, 3, 4)},
    "grouped": {"spatial_heads": (1, 2, 4, 8)},
}


def trained(name: str = "ca3d_tiny", **options: Any) -> nn.Module:
    """A model whose normalisations do something: scales of both signs, some of them 0."""
    model = models.create(name, 7, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(-0.5, 1.5)
                module.weight[::5] = 0
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.Conv2d):
                module.bias.uniform_(-0.3, 0.3)
    return model.eval()


def clip_for(model: nn.Module, batch: int = 2, size: int = 36) -> Tensor:
    return torch.randn(batch, 3, model.frames, size, size)


def largest_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("portable", [False, True], ids=["kernels", "portable"])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_logits_are_the_same(name: str, portable: bool) -> None:
    model = trained(**OPTIONS[name]).double()
    clip = clip_for(model).double()
    fused = ca3d.fuse(model, portable=portable)
    assert largest_error(fused(clip), model(clip)) < 1e-11
    single, narrow = model.float(), clip.float()
    expected = fused(clip)
    own = largest_error(single(narrow), expected)
    found = largest_error(ca3d.fuse(single, portable=portable)(narrow), expected)
    assert found <= 2 * own + 1e-6


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_is_as_exact_as_the_model_itself(precision: str) -> None:
    dtype = getattr(torch, precision)
    model = trained().to(dtype)
    clip = clip_for(model, batch=4).to(dtype)
    wide = copy.deepcopy(model).double()
    expected = wide(clip.double())
    regime = for_inference(precision)
    # bfloat16 is an autocast of a float32 model.
    unfused = model if precision == "float16" else wide.float()
    own = largest_error(regime.forward(unfused, clip.to(unfused.classifier.weight)), expected)
    found = ca3d.fuse(model)(clip)
    assert found.dtype == dtype
    assert largest_error(found, expected) <= 1.5 * own


@torch.no_grad()
def test_parts_fit_together() -> None:
    model = ca3d.fuse(trained())
    clip = clip_for(model)
    frames = torch.cat([model.encode_frames(clip[:, :, i : i + 4]) for i in range(0, 16, 4)], 2)
    pairs = torch.cat([model.encode_pairs(frames[:, :, i : i + 2]) for i in range(0, 16, 2)], 2)
    assert torch.equal(model.classify(model.encode_clip(pairs)), model(clip))


@torch.no_grad()
def test_original_is_untouched() -> None:
    model = trained().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = ca3d.fuse(model)
    addresses = {p.data_ptr() for p in model.parameters()} - {0}
    assert not addresses & {p.data_ptr() for p in fused.parameters()}
    for p in fused.parameters():
        p.fill_(1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["ca3d_tiny", "r3d_tiny"])
def test_models_from_inference_mode_get_ordinary_weights(name: str) -> None:
    clips = torch.randn(1, 3, 16, 32, 32)
    with torch.inference_mode():
        model = trained(name).eval()
        fused = ca3d.fuse(model)
        assert largest_error(fused(clips), model(clips)) < 1e-5
    if name == "ca3d_tiny":
        assert not any(p.is_inference() for p in fused.parameters())


def test_nothing_is_left_to_fold() -> None:
    fused = ca3d.fuse(trained())
    kinds = (nn.modules.batchnorm._BatchNorm, nn.Dropout)
    named = fused.named_modules()
    left = [m for name, m in named if isinstance(m, kinds) and "attention" not in name]
    assert not left
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())
    weights = [m.weight for m in fused.modules() if hasattr(m, "stride")]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_wrong_use_is_refused() -> None:
    model = models.create("ca3d_tiny", 5)
    fused = ca3d.fuse(model)
    with pytest.raises(RuntimeError, match="for inference"):
        fused.train()
    assert fused.eval() is fused
    with pytest.raises(TypeError, match="fused already"):
        ca3d.fuse(fused)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        ca3d.fuse("model.safetensors")
    with pytest.raises(ValueError, match="clips of 16 frames, got 8"):
        fused(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ValueError, match="holds 8 frames, got 4"):
        fused.encode_clip(torch.zeros(1, 32, 4, 4, 4))
    model.layers["spatial1"].norm = norm = BatchNorm(8)
    norm.running_mean = None
    with pytest.raises(ValueError, match="needs running statistics"):
        ca3d.fuse(model)
    model.layers["spatial1"].norm = BatchNorm(8)
    model.layers["spatial2"] = nn.Identity()
    with pytest.raises(TypeError, match="spatial2 of type Identity"):
        ca3d.fuse(model)


class Branching(nn.Module):
    """Control flow on values, which torch.fx can't follow."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4) if norm else nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


@torch.no_grad()
def test_other_models() -> None:
    from torchvision.models.video import r2plus1d_18

    model = r2plus1d_18(num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    clip = torch.randn(1, 3, 4, 32, 32)
    fused = ca3d.fuse(model)
    assert not any(isinstance(m, nn.BatchNorm3d) for m in fused.modules())
    assert largest_error(fused(clip), model(clip)) < 1e-5
    assert any(isinstance(m, nn.BatchNorm3d) for m in model.modules())


# Those that normalise by batches; in the others there is nothing to fold.
BASELINES: dict[str, dict[str, Any]] = {
    "r3d_18": {"widths": (4, 8, 16, 32)},
    "r2plus1d_18": {"widths": (4, 8, 16, 32)},
    "i3d": {"width": 1 / 16},
    "x3d_xl": {"width": 0.6, "depth": 1.0, "head_width": 64},
}


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_baselines(name: str) -> None:
    model = trained(name, frames=8, size=32, **BASELINES[name]).eval()
    clips = torch.randn(2, 3, 8, 32, 32)
    fused = ca3d.fuse(model)
    assert largest_error(fused(clips), model(clips)) < 1e-4
    assert not any(isinstance(m, nn.BatchNorm3d) for m in fused.modules())


@torch.no_grad()
def test_what_can_not_be_folded_stays_or_is_refused() -> None:
    shared = nn.Conv3d(3, 3, 1)
    model = nn.Sequential(nn.BatchNorm3d(3), shared, nn.BatchNorm3d(3), shared, nn.Dropout()).eval()
    fused = ca3d.fuse(model)
    assert sum(isinstance(m, nn.BatchNorm3d) for m in fused) == 2
    x = torch.randn(2, 3, 4, 4, 4)
    assert largest_error(fused(x), model(x)) < 1e-6
    with pytest.raises(TypeError, match="can't follow Branching"):
        ca3d.fuse(Branching(norm=True))
    assert not ca3d.fuse(Branching(norm=False)).training


@torch.no_grad()
def test_exports_without_our_operators() -> None:
    model = ca3d.fuse(trained(spatial_depths=(1, 1, 1, 1), temporal_depths=(0, 0, 1, 1)))
    clip = clip_for(model, 1, 32)
    program = torch.export.export(model, (clip,))
    assert torch.equal(program.module()(clip), model(clip))


def test_fused_model_class_is_public() -> None:
    assert isinstance(ca3d.fuse(models.ca3d_tiny(5)), FusedCA3D)
