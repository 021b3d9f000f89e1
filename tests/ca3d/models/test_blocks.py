"""The parts: time pool, residual column, positional table, head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ca3d.models.blocks import (
    Head,
    PositionalTable,
    ResidualBlock,
    ResidualColumn,
    SpatialBlock,
    TemporalBlock,
)
from ca3d.models.layout import to_channels_last
from ca3d.models.norm import BatchNorm
from ca3d.models.time_pool import TimePool


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 2, 2, 1, 1), (2, 1, 8, 3, 1)])
def test_time_pool_equals_torchs(shape: tuple[int, ...]) -> None:
    # Few distinct values, so that pairs often tie: the first must take the gradient.
    clip = torch.randint(0, 3, shape).double()
    clips = [to_channels_last(clip.clone()).requires_grad_(), clip.requires_grad_()]
    results = [TimePool()(clips[0]), F.max_pool3d(clips[1], (2, 1, 1))]
    assert torch.equal(*results)
    weight = torch.randn_like(results[1])
    for result in results:
        (result * weight).sum().backward()
    assert torch.equal(clips[0].grad, clips[1].grad)
    assert clips[0].grad.is_contiguous(memory_format=torch.channels_last_3d)


def test_time_pool_keeps_nan_and_infinity() -> None:
    nan, inf = torch.nan, torch.inf
    clip = torch.tensor([nan, 1.0, 1.0, nan, -inf, inf, inf, 2.0]).view(1, 1, 8, 1, 1)
    clip.requires_grad_()
    pooled = TimePool()(clip)
    assert pooled.isnan().flatten().tolist() == [True, True, False, False]
    assert pooled.flatten()[2:].tolist() == [inf, inf]
    pooled.backward(torch.full_like(pooled, inf))
    assert clip.grad is not None
    assert clip.grad.flatten().tolist() == [inf, 0, 0, inf, 0, inf, inf, 0]


def test_time_pool_derivatives() -> None:
    clip = torch.randn(1, 2, 4, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TimePool(), clip, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(TimePool(), clip)


def test_time_pool_keeps_one_byte_an_output() -> None:
    clip = to_channels_last(torch.randn(2, 8, 4, 6, 6)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pooled = TimePool()(clip)
    assert [(x.dtype, x.numel()) for x in kept] == [(torch.bool, pooled.numel())]


def test_time_pool_refuses_odd_clips() -> None:
    with pytest.raises(ValueError, match="even number of frames, got 5"):
        TimePool()(torch.zeros(1, 1, 5, 1, 1))
    with pytest.raises(ValueError, match="got 3 frames"):
        TimePool.frames_after(TimePool.frames_after(6))
    assert TimePool()(torch.ones(1, 1, 1, 1, 1)).shape[2] == 1


def plain(block: ResidualBlock, x: torch.Tensor) -> torch.Tensor:
    """The definition: each convolution is followed by ReLU and then BN, then x is added."""
    y = F.relu(block.conv1(x))
    y = F.batch_norm(y, None, None, block.norm1.weight, block.norm1.bias, training=True)
    y = F.relu(block.conv2(y))
    y = F.batch_norm(y, None, None, block.norm2.weight, block.norm2.bias, training=True)
    return x + y


@pytest.mark.parametrize(("kernel", "heads"), [((3, 3), 1), ((3, 1), 4), ((3, 3), 2)])
def test_residual_column(kernel: tuple[int, int], heads: int) -> None:
    column = ResidualColumn(8, 2, kernel, heads).double()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    operands = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ours = column(operands[0])
    expected = operands[1]
    for block in column:
        expected = plain(block, expected)
    torch.testing.assert_close(ours, expected)
    for y in (ours, expected):
        y.square().sum().backward()
    torch.testing.assert_close(operands[0].grad, operands[1].grad)
    assert torch.equal(operands[0], x)  # the block's input is not overwritten


def test_blocks_take_any_layout() -> None:
    clip = torch.randn(2, 8, 4, 6, 6)
    for block in (SpatialBlock(8, 16), TemporalBlock(8, 2), PositionalTable(8, 4), Head(8, 0.0)):
        outputs = [block(x) for x in (clip, to_channels_last(clip), clip.mT.contiguous().mT)]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


def test_temporal_block_mixes_no_pixels_and_no_heads() -> None:
    block = TemporalBlock(8, heads=2, depth=1).eval()
    clip = torch.randn(1, 8, 5, 3, 3)
    expected = block(clip)
    clip[:, :4, :, 1, 1] += 1.0
    change = (block(clip) - expected).abs().amax((0, 2))
    assert (change[:4, 1, 1] > 0).all()
    change[:4, 1, 1] = 0
    assert change.max() == 0


def test_spatial_block_mixes_no_frames() -> None:
    block = SpatialBlock(3, 8, depth=1).eval()
    clip = torch.randn(1, 3, 4, 8, 8)
    expected = block(clip)
    clip[:, :, 2] += 1.0
    change = (block(clip) - expected).abs().amax((0, 1, 3, 4))
    assert (change > 0).tolist() == [False, False, True, False]


def test_positional_table() -> None:
    table = PositionalTable(4, 3)
    nn.init.normal_(table.weight)
    clip = torch.randn(2, 4, 3, 2, 2)
    assert torch.equal(table(clip)[1, 2, 1], clip[1, 2, 1] + table.weight[2, 1])
    assert table(clip.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="holds 3 frames, got 4"):
        table(torch.zeros(1, 4, 4, 2, 2))


def test_every_normalisation_of_a_block_is_ours() -> None:
    for block in (SpatialBlock(3, 8), TemporalBlock(8, 2)):
        norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 6
        assert all(isinstance(norm, BatchNorm) for norm in norms)


def test_channels_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"channels \(6\) must be divisible by heads \(4\)"):
        ResidualBlock(6, (3, 3), heads=4)
