"""The folded temporal half as a function and as an op of torch."""

from typing import Any

import pytest
import torch
from block_cases import Case

from ca3d_kernels import temporal_block
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.temporal_block.op import Weights

NAMES = ("x", *Weights._fields)


def test_opcheck() -> None:
    operands = Case(frames=4, head_dim=4, positions=2).tensors(torch.float32)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.ca3d.temporal_block, (*operands, *Options()), test_utils=utilities
    )


def test_compile_and_export() -> None:
    operands = Case(frames=4, head_dim=4, positions=2).tensors(torch.float32)
    expected = temporal_block(*operands)
    torch._dynamo.reset()
    compiled = torch.compile(temporal_block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*operands), expected)

    class Block(torch.nn.Module):
        def forward(self, *operands: torch.Tensor) -> torch.Tensor:
            return temporal_block(*operands)

    program = torch.export.export(Block(), tuple(operands))
    assert "ca3d.temporal_block" in str(program.graph)
    assert torch.equal(program.module()(*operands), expected)


def test_nothing_to_do() -> None:
    x, *weights = Case().tensors(torch.float32)
    assert temporal_block(x[:0], *weights).shape == x[:0].shape
    assert temporal_block(x[:, :, :0], *weights).shape == x[:, :, :0].shape


def test_channels_that_are_not_contiguous_are_copied() -> None:
    x, *weights = Case().tensors(torch.float32)
    other = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(temporal_block(other, *weights), temporal_block(x, *weights))


def changed(**changes: Any) -> list[Any]:
    operands: dict[str, Any] = dict(zip(NAMES, Case().tensors(torch.float32), strict=True))
    return list({**operands, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 8, 5, 128, dtype=int)}, TypeError, "x must have one of the dtypes"),
        ({"x": torch.ones(2, 8, 128)}, ValueError, r"x must have shape \(B, T, N, C\)"),
        ({"x": torch.ones(2, 0, 5, 128)}, ValueError, "only B and N may be 0"),
        ({"x": torch.ones(2, 7, 5, 128)}, ValueError, r"qkv_bias must have shape \(2, 7, 192\)"),
        ({"x": torch.ones(2, 8, 5, 64)}, ValueError, "qkv_weight must have shape .*d = 64"),
        ({"norm_scale": torch.ones(128)}, ValueError, r"norm_scale must have shape \(2, 64\)"),
        ({"norm_shift": None}, TypeError, "norm_shift must be a tensor, got NoneType"),
        (
            {"column_bias": torch.ones(4, 2, 64).half()},
            TypeError,
            "column_bias must have x's dtype torch.float32, got torch.float16",
        ),
        (
            {"column_weight": torch.ones(3, 2, 192, 64)},
            ValueError,
            "column_weight must hold two convolutions for each residual block, got 3",
        ),
        (
            {"qkv_bias": torch.ones(2, 8, 192, device="meta")},
            ValueError,
            "qkv_bias must be on x's device cpu, got meta",
        ),
    ],
)
def test_bad_tensors(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        temporal_block(*changed(**changes))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"edge": "wrap"}, ValueError, "edge must be one of"),
        ({"key_table": [[(0, 0)]]}, ValueError, "key_table needs edge='zero'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, ValueError, "cuda has no kernel for temporal_block"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ],
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        temporal_block(*changed(), **options)


def test_a_gradient_is_refused() -> None:
    operands = changed()
    operands[0].requires_grad_()
    with pytest.raises(RuntimeError, match="temporal_block has no derivatives"):
        temporal_block(*operands)
    with torch.no_grad():
        temporal_block(*operands)
