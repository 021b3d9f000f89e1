"""The fused Triton kernels against their definition; runs in Triton's interpreter.

Not collected by itself: `test_interpreted.py` runs it in a process of its own.
"""

import itertools

import pytest
import torch
from attention_cases import assert_close
from exhaustive import often
from qkv_cases import CASES, Case, check

from ca3d_kernels import LocalTemporalAttention, UnsupportedInputError, use_backend
from ca3d_kernels.qkv_attention import op


@pytest.mark.parametrize(
    ("case", "dtype"),
    often(
        itertools.product(CASES, (torch.float16, torch.bfloat16)),
        lambda case, dtype: dtype == torch.float16 or case in CASES[::3],
    ),
)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    with use_backend("triton", fallback=False):
        check(case, dtype, "triton")


def test_the_gradient_of_a_bias_does_not_need_the_bias() -> None:
    x, grad = torch.randn(2, 2, 7, 3, 32).half()
    weight = torch.randn(2, 48, 16).half()
    options = (5, 1, False, None, "truncate", [])
    ours, same_dtype, exact = (
        torch.ops.ca3d.qkv_attention_backward(*tensors, None, *options, backend)[2]
        for tensors, backend in (
            ((grad, x, weight), "triton"),
            ((grad, x, weight), "reference"),
            ([t.double() for t in (grad, x, weight)], "reference"),
        )
    )
    assert_close("dbias", ours, same_dtype, exact)


@pytest.mark.parametrize("kind", ["own", "published", "folded"])
def test_the_layer_uses_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = "published" if kind == "published" else None
    layer = LocalTemporalAttention(64, 2, preset=preset, backend="triton", dtype=torch.float16)
    if kind == "folded":
        scale, shift, position = torch.rand(64), torch.randn(64), torch.randn(64, 8)
        layer = layer.fold(scale, shift, position)
    x = torch.randn(2, 64, 8, 3, 3, dtype=torch.float16)
    calls = []
    run = op.qkv_attention
    monkeypatch.setattr(op, "qkv_attention", lambda *a: (calls.append(a), run(*a))[1])
    fused = layer(x)
    assert len(calls) == 1
    monkeypatch.setattr(op, "is_fused", lambda *a: False)
    separate = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(fused, separate, rtol=4e-3, atol=4e-3)
    assert fused.stride() == separate.stride()


@pytest.mark.parametrize("table", ["own", "published"])
def test_infinities_stay_in_their_position(table: str) -> None:
    case = Case(frames=4, positions=9, edge="zero", table=table)
    x, weight, bias, _ = case.tensors(torch.float16)
    clean = op.qkv_attention(x, weight, bias, case.options("triton"))
    x[0, 1, 4, 3] = torch.inf
    output = op.qkv_attention(x, weight, bias, case.options("triton"))
    others = [n for n in range(9) if n != 4]
    assert torch.equal(output[:, :, others], clean[:, :, others])
    assert not output[0, 1, 4, : case.head_dim].isfinite().any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frames": 33, "kernel_size": 34}, "33 frames are more than the 32 that a tile holds"),
        ({"head_dim": 128}, "head_dim 128 is not 16, 32 or 64"),
        (
            {"frames": 9, "heads": 4, "edge": "zero", "table": "published"},
            "4 heads of 9 frames, in powers of two, are more than the 32 rows",
        ),
        (
            {"frames": 1, "heads": 9, "edge": "zero", "table": "published"},
            "a key table of 9 heads of head_dim 64 needs too much shared memory",
        ),
    ],
)
def test_refusals(changes: dict, reason: str) -> None:
    case = Case(**changes)
    x, weight, bias, _ = case.tensors(torch.float16)
    with (
        use_backend("triton", fallback=False),
        pytest.raises(UnsupportedInputError, match=reason),
    ):
        op.qkv_attention(x, weight, bias, case.options("triton"))
    with pytest.warns(RuntimeWarning, match=reason):
        op.qkv_attention(x, weight, bias, case.options("triton"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bias": "frame"}, "there is no backward kernel for a bias of every frame"),
        ({"frames": 17, "kernel_size": 9}, "17 frames are more than the 16 .* backward pass"),
    ],
)
def test_refusals_of_the_backward_pass(changes: dict, reason: str) -> None:
    case = Case(**changes)
    *operands, grad = case.tensors(torch.float16)
    leaves = [x.requires_grad_() for x in operands]
    with use_backend("triton", fallback=False):
        output = op.qkv_attention(*leaves, case.options("triton"))
        with pytest.raises(UnsupportedInputError, match=reason):
            torch.autograd.grad(output, leaves, grad)
    assert not op.is_fused(*leaves, case.options("triton"))
    with torch.no_grad():
        assert op.is_fused(*leaves, case.options("triton"))
