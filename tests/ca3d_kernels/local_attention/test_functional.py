"""The public functions: what they refuse, what their results look like, the published key table."""

import math
from typing import Any

import pytest
import torch
from attention_cases import backends_here

from ca3d_kernels import (
    local_temporal_attention,
    local_temporal_attention_packed,
    published_key_table,
)
from ca3d_kernels.local_attention.layout import collapse_leading, empty_dense

TABLE = published_key_table(2, 5)
BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "window of none": ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    "negative window": ({"kernel_size": -3}, ValueError, "kernel_size must be at least 1, got -3"),
    "fraction of a window": ({"kernel_size": 2.5}, TypeError, "kernel_size must be an integer"),
    "window of True": ({"kernel_size": True}, TypeError, "kernel_size must be an integer"),
    "dilation": ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    "causal": ({"causal": 1}, TypeError, "causal must be a bool, got 1"),
    "scale NaN": ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "scale infinite": ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    "scale text": ({"scale": "1"}, TypeError, "scale must be a float or None, got '1'"),
    "edge": ({"edge": "wrap"}, ValueError, r"edge must be one of \('truncate', .*got 'wrap'"),
    "edge None": ({"edge": None}, ValueError, "edge must be one of"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of .* got 'gpu'"),
    "backend elsewhere": ({"backend": "cuda"}, ValueError, "backend='cuda' can't run.*on cpu"),
    "table, edge": ({"key_table": TABLE}, ValueError, "key_table needs edge='zero'"),
    "table, dilation": (
        {"key_table": TABLE, "edge": "zero", "dilation": 2}, ValueError, "dilation=2"
    ),
    "table, causal": (
        {"key_table": TABLE, "edge": "zero", "causal": True}, ValueError, "causal=True"
    ),
    "table, heads": (
        {"key_table": published_key_table(4, 5), "edge": "zero"}, ValueError, "heads=2"
    ),
    "table, slots": (
        {"key_table": TABLE, "edge": "zero", "kernel_size": 3}, ValueError, "kernel_size=3"
    ),
    "table, head out of range": (
        {"key_table": [[[2, 0]], [[0, 0]]], "edge": "zero", "kernel_size": 1},
        ValueError, "key_table names head 2; heads must be in 0 to 1",
    ),
    "table, slot out of range": (
        {"key_table": [[[0, 0]], [[0, -1]]], "edge": "zero", "kernel_size": 1},
        ValueError, "key_table names slot -1; slots must be in 0 to 0",
    ),
    "table of floats": (
        {"key_table": torch.zeros(2, 5, 2), "edge": "zero"}, TypeError, "key_table must hold"
    ),
    "table of another depth": ({"key_table": [1, 2], "edge": "zero"}, TypeError, "key_table"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, *backends_here()])
@pytest.mark.parametrize("case", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(case: tuple, backend: str | None) -> None:
    options, error, words = case
    options = {"backend": backend, **options}
    with pytest.raises(error, match=words):
        local_temporal_attention(*torch.randn(3, 2, 4, 8), **options)
    with pytest.raises(error, match=words):
        local_temporal_attention_packed(torch.randn(2, 3, 4, 8), **options)


x = torch.randn(1, 2, 4, 8)
BAD_OPERANDS: dict[str, tuple[tuple, type[Exception], str]] = {
    "rank": ((x[0, 0],) * 3, ValueError, r"q must have shape .* got \(4, 8\)"),
    "shape of k": ((x, x[:, :1], x), ValueError, r"k must have q's shape .*\(1, 1, 4, 8\)"),
    "frames of v": ((x, x, x[:, :, :3]), ValueError, "v must have q's shape"),
    "dtype of v": ((x, x, x.double()), TypeError, "v must have q's dtype.*got torch.float64"),
    "integers": ((x.int(),) * 3, TypeError, "q must have one of the dtypes.*got torch.int32"),
    "complex": ((x.to(torch.complex64),) * 3, TypeError, "q must have one of the dtypes"),
    "device": ((x, x.to("meta"), x), ValueError, "k must be on q's device cpu, got meta"),
    "list": (([1.0], x, x), TypeError, "q must be a tensor, got list"),
    "no heads": ((x[:, :0],) * 3, ValueError, "q must not be empty in heads, T, head_dim"),
    "no frames": ((x[:, :, :0],) * 3, ValueError, "q must not be empty"),
    "no channels": ((x[..., :0],) * 3, ValueError, "q must not be empty"),
    "sparse": ((x.to_sparse(),) * 3, ValueError, "q must be a strided tensor"),
}
BAD_PACKED: dict[str, tuple[object, type[Exception], str]] = {
    "rank": (x[0], ValueError, "qkv must have shape"),
    "two slices": (torch.randn(2, 2, 4, 8), ValueError, "qkv must have size 3 in dimension -3"),
    "integers": (torch.zeros(2, 3, 4, 8, dtype=torch.long), TypeError, "qkv must have one of"),
    "None": (None, TypeError, "qkv must be a tensor, got NoneType"),
    "no frames": (torch.zeros(2, 3, 0, 8), ValueError, "qkv must not be empty"),
}


@pytest.mark.parametrize("case", BAD_OPERANDS.values(), ids=BAD_OPERANDS.keys())
def test_bad_operands(case: tuple) -> None:
    operands, error, words = case
    with pytest.raises(error, match=words):
        local_temporal_attention(*operands)


@pytest.mark.parametrize("case", BAD_PACKED.values(), ids=BAD_PACKED.keys())
def test_bad_packed_operand(case: tuple) -> None:
    operand, error, words = case
    with pytest.raises(error, match=words):
        local_temporal_attention_packed(operand)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled: bool, device: str) -> None:
    torch._dynamo.reset()
    attend = local_temporal_attention
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 4, 8))
    with torch.autocast(device, dtype=torch.bfloat16):
        output = attend(q, k.half(), v)
        assert attend(q.double(), k.double(), v.double()).dtype == torch.float64
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert q.grad.dtype == torch.float32
    expected = local_temporal_attention(*(t.bfloat16() for t in (q, k.half(), v)))
    assert torch.equal(output, expected)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=False):
        assert attend(q, k, v).dtype == torch.float32


def test_key_table_may_be_a_tensor() -> None:
    q, k, v = torch.randn(3, 2, 4, 8)
    a = local_temporal_attention(q, k, v, edge="zero", key_table=TABLE)
    b = local_temporal_attention(q, k, v, edge="zero", key_table=torch.tensor(TABLE))
    assert torch.equal(a, b)
    assert not torch.allclose(a, local_temporal_attention(q, k, v, edge="zero"))


def test_published_key_table_reads_every_slot_of_every_head_once() -> None:
    for heads, kernel_size in ((1, 5), (4, 5), (8, 5), (6, 3), (2, 7)):
        table = published_key_table(heads, kernel_size)
        pairs = [pair for row in table for pair in row]
        assert sorted(pairs) == [(h, n) for h in range(heads) for n in range(kernel_size)]
    assert published_key_table(1, 5) == (tuple((0, n) for n in range(5)),)


@pytest.mark.parametrize(("heads", "inverse_of_5"), [(4, 1), (8, 5)])
def test_published_key_table_in_closed_form(heads: int, inverse_of_5: int) -> None:
    for j, row in enumerate(published_key_table(heads, 5)):
        assert {(((j - n) * inverse_of_5) % heads, n) for n in range(5)} == set(row)


def test_head_order_renames_the_heads() -> None:
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    q, k, v = torch.randn(3, 8, 4, 16, dtype=torch.float64)
    published = local_temporal_attention(q, k, v, edge="zero", key_table=published_key_table(8, 5))
    index = list(order)
    ours = local_temporal_attention(
        q[index], k[index], v[index], edge="zero", key_table=published_key_table(8, 5, order)
    )
    torch.testing.assert_close(ours, published[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0, 5), ValueError, "heads must be at least 1, got 0"),
        ((4, 0), ValueError, "kernel_size must be at least 1, got 0"),
        ((4.0, 5), TypeError, "heads must be an integer, got 4.0"),
        ((4, 5, (0, 1, 2, 2)), ValueError, r"head_order must be a permutation of 0 to 3, got \("),
        ((4, 5, (0, 1, 2)), ValueError, "head_order"),
        ((2, 5, (0, 0.5)), TypeError, "head_order must hold integers"),
    ],
)
def test_bad_published_key_table(arguments: tuple, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        published_key_table(*arguments)


def test_result_has_the_order_of_the_queries() -> None:
    batch, frames, pixels, heads, dim = 2, 4, 6, 3, 8
    y = torch.randn(batch, frames, pixels, heads, 3, dim)
    qkv = y.permute(0, 2, 3, 4, 1, 5)
    output = local_temporal_attention_packed(qkv)
    assert output.permute(0, 3, 1, 2, 4).is_contiguous()
    q, k, v = qkv.unbind(-3)
    assert local_temporal_attention(q, k.contiguous(), v).stride() == output.stride()
    assert local_temporal_attention(q.contiguous(), k, v).is_contiguous()
    expanded = torch.randn(1, heads, frames, dim).expand(batch, -1, -1, -1)
    assert local_temporal_attention(expanded, expanded, expanded).is_contiguous()


def test_gradient_of_a_projection_has_its_layout() -> None:
    y = torch.randn(2, 4, 6, 3, 3, 8, requires_grad=True)
    qkv = y.permute(0, 2, 3, 4, 1, 5)
    local_temporal_attention_packed(qkv).sum().backward()
    assert y.grad.is_contiguous()


def test_views_where_strides_merge_and_one_copy_where_not() -> None:
    whole = torch.randn(2, 3, 5, 4, 8, 16)
    merging = whole[:, :, 1:4]
    apart = whole.permute(2, 1, 0, 3, 4, 5).contiguous().permute(2, 1, 0, 3, 4, 5)[:, :, 1:4]
    result = torch.empty(2, 3, 3, 4, 8, 16)
    with collapse_leading([merging, apart], [result]) as (sources, targets):
        assert sources[0].data_ptr() == merging.data_ptr()
        assert sources[1].data_ptr() != apart.data_ptr()
        assert torch.equal(sources[0].view(2, 3, 3, 4, 8, 16), merging)
        assert torch.equal(sources[1].view(2, 3, 3, 4, 8, 16), apart)
        targets[0].copy_(sources[0])
    assert torch.equal(result, merging)


def test_a_result_whose_strides_do_not_merge_is_copied_back() -> None:
    q = torch.randn(2, 3, 4, 5, 2, 4, 8).permute(2, 0, 3, 1, 4, 5, 6)[:, :, ::2]
    source = torch.randn(q.shape)
    # Odd gaps: neither pair of neighbouring dimensions of this result merges.
    wide = torch.zeros([n + 1 for n in q.shape[:-1]] + [8])
    result = wide[tuple(slice(0, n) for n in q.shape)]
    with collapse_leading([source], [result]) as (sources, targets):
        targets[0].copy_(sources[0])
    assert torch.equal(result, source)


def test_empty_dense_is_dense() -> None:
    for shape in ((3, 4, 5), (1, 4, 5), (3, 1, 1), (2, 0, 3)):
        for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1)):
            like = torch.empty([shape[i] for i in order]).permute(
                [order.index(i) for i in range(3)]
            )
            dense = empty_dense(like)
            assert dense.shape == like.shape
            assert dense.stride(-1) == 1
            assert dense.untyped_storage().nbytes() == 4 * like.numel()
