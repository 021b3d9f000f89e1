"""The ablations: each replaces what it names, and nothing else."""

import pytest
import torch
from torch import nn

from ca3d import models
from ca3d.models.blocks import ResidualBlock, TemporalBlock
from ca3d.models.norm import BatchNorm
from ca3d.models.variants import ATTENTIONS, ChannelNorm, PatternAttention, PreActivationBlock
from ca3d.precision import create
from ca3d_kernels import LocalTemporalAttention

VARIANTS = [
    *({"attention": name} for name in ATTENTIONS),
    {"norm": "layer"},
    {"column": "mlp"},
    {"block": "pre"},
    {"head": "token"},
    {"position": False},
    {"attention": "grid", "norm": "layer", "block": "pre", "head": "token", "column": "mlp"},
]


def _train_step(model: nn.Module, regime_name: str) -> float:
    regime = create(regime_name)
    model = regime.prepare(model).train()
    sgd = regime.optimizer("sgd", model.parameters(), lr=0.01)
    logits = regime.forward(model, torch.randn(8, 3, 8, 16, 16))
    loss = regime.loss(logits, torch.arange(8) % 5)
    regime.backward(loss)
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused
    # Layer normalisation of 8 channels that are all 0 after the ReLU multiplies gradients by
    # eps^-1/2 at every layer: float16 may skip such a step.
    assert regime.step(sgd, model.parameters()).applied or regime_name == "float16"
    return float(loss.detach())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_trains_and_can_be_rebuilt(options: dict) -> None:
    model = models.create("ca3d_variant", num_classes=5, frames=8, **options)
    rebuilt = models.create(model.name, **model.options)
    rebuilt.load_state_dict(model.state_dict())
    clip = torch.randn(2, 3, 8, 16, 16)
    assert torch.equal(model.eval()(clip), rebuilt.eval()(clip))
    assert _train_step(model, "float32") < 20
    assert _train_step(rebuilt, "float16") < 20


def test_without_a_change_it_is_ca3d_tiny() -> None:
    torch.manual_seed(0)
    plain = models.create("ca3d_tiny", num_classes=5)
    variant = models.create("ca3d_variant", num_classes=5)
    variant.load_state_dict(plain.state_dict())
    clip = torch.randn(2, 3, 16, 32, 32)
    assert torch.equal(plain.eval()(clip), variant.eval()(clip))


def test_each_option_replaces_what_it_names() -> None:
    def count(model: nn.Module, kind: type) -> int:
        return sum(type(m) is kind for m in model.modules())

    plain = models.create("ca3d_tiny", num_classes=5)
    layer = models.create("ca3d_variant", num_classes=5, norm="layer")
    assert count(layer, BatchNorm) == 0
    assert count(layer, ChannelNorm) == count(plain, BatchNorm)
    pre = models.create("ca3d_variant", num_classes=5, block="pre")
    assert count(pre, PreActivationBlock) == count(plain, ResidualBlock)
    narrow = models.create("ca3d_variant", num_classes=5, column="mlp")
    blocks = [m for m in narrow.modules() if isinstance(m, TemporalBlock)]
    assert {b.column[0].conv1.kernel_size for b in blocks} == {(1, 1)}
    table = plain.layers["position"].weight.numel()
    without = models.create("ca3d_variant", num_classes=5, position=False)
    assert isinstance(without.layers["position"], nn.Identity)
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, without)]
    assert counts[0] - counts[1] == table


@pytest.mark.parametrize("frames", [4, 8])
def test_patterns_agree_with_the_kernel(frames: int) -> None:
    local = LocalTemporalAttention(8, 2, 5)
    x = torch.randn(2, 8, frames, 3, 2)
    torch.testing.assert_close(PatternAttention(local, "local")(x), local(x))
    # A window that reaches everywhere is full attention.
    wide = LocalTemporalAttention(8, 2, 2 * frames - 1)
    wide.load_state_dict(local.state_dict())
    torch.testing.assert_close(PatternAttention(local, "full")(x), wide(x))


def test_space_time_on_one_pixel_is_full_attention() -> None:
    local = LocalTemporalAttention(8, 2, 5)
    x = torch.randn(2, 8, 6, 1, 1)
    full = PatternAttention(local, "full")(x)
    torch.testing.assert_close(PatternAttention(local, "space-time")(x), full)
    # On several pixels each sees the others: a change of one reaches all.
    x = torch.randn(1, 8, 2, 2, 2)
    changed = x.clone()
    changed[..., 1, 1, 1] += 1
    for pattern, reached in (("full", 2), ("space-time", 8)):
        attention = PatternAttention(local, pattern)
        moved = (attention(x) != attention(changed)).any(1).sum()
        assert int(moved) == reached


def test_linear_attention_is_a_weighted_mean() -> None:
    local = LocalTemporalAttention(4, 1, 3)
    with torch.no_grad():
        local.qkv_weight.zero_()
        local.qkv_weight[:, 8:] = torch.eye(4)
    x = torch.randn(1, 4, 6, 2, 2)
    mean = x.mean(2, keepdim=True).expand_as(x)
    torch.testing.assert_close(PatternAttention(local, "linear")(x), mean)


def test_grid_windows_are_shifted_in_every_second_block() -> None:
    model = models.create("ca3d_variant", num_classes=5, attention="grid", frames=32)
    first, second = (m for m in model.modules() if isinstance(m, PatternAttention))
    groups = [(a.mask(10).int().argmax(1)).unique().tolist() for a in (first, second)]
    assert groups == [[0, 5], [0, 3, 8]]


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="attention must be one of"):
        models.create("ca3d_variant", num_classes=5, attention="global")
    with pytest.raises(ValueError, match="has no dense_qkv"):
        models.create("ca3d_variant", num_classes=5, attention="full", dense_qkv=True)
