"""The compiled attention kernels, called directly, against the definition in float64."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.local_attention import reference

native = backends.native()
if native is None:
    pytest.skip("the native library is not built", allow_module_level=True)

EDGES = ("truncate", "zero", "shift")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One problem; `outer` and `inner` are the two leading dimensions that the kernels know."""

    heads: int = 2
    frames: int = 8
    head_dim: int = 64
    kernel_size: int = 5
    dilation: int = 1
    causal: bool = False
    edge: str = "truncate"
    outer: int = 2
    inner: int = 3
    scale: float | None = None
    table: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.outer, self.inner, self.heads, self.frames, self.head_dim)

    @property
    def options(self) -> dict:
        return {
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "causal": self.causal,
            "edge": self.edge,
            "scale": self.head_dim**-0.5 if self.scale is None else self.scale,
            "key_table": self.table or None,
        }

    def tensors(self, count: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(self.shape).to(dtype) for _ in range(count)]


def operand(x: Tensor) -> tuple[int, ...]:
    assert x.dim() == 5
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return (x.data_ptr(), *x.stride()[:4])


def problem(case: Case, dtype: torch.dtype) -> tuple:
    window = (case.kernel_size, case.dilation, int(case.causal), EDGES.index(case.edge))
    name = str(dtype).removeprefix("torch.")
    return name, case.shape, window, case.options["scale"], case.table


def forward(case: Case, q: Tensor, k: Tensor, v: Tensor, threads: int = 2) -> Tensor:
    o = torch.empty(case.shape, dtype=q.dtype)
    operands = [operand(x) for x in (q, k, v, o)]
    native.local_attention_forward(*problem(case, q.dtype), *operands, threads)
    return o


def backward(
    case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor, threads: int = 2
) -> list[Tensor]:
    grads = [torch.empty(case.shape, dtype=q.dtype) for _ in range(3)]
    operands = [operand(x) for x in (q, k, v, do, *grads)]
    native.local_attention_backward(*problem(case, q.dtype), *operands, threads)
    return grads


def assert_close(ours: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype, plus two roundings.

    For float64 nothing more exact is at hand, so both results may be off by a few roundings."""
    roundings = 16 if ours.dtype == torch.float64 else 2
    floor = roundings * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    allowed = 2 * (same_dtype.double() - exact).abs().max().item() + floor
    error = (ours.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
    if ours.dtype in (torch.float16, torch.bfloat16):
        ulp = torch.finfo(ours.dtype).eps * exact.abs()
        near = (ours.double() - exact.to(ours.dtype).double()).abs() <= ulp + floor / 4
        assert near.double().mean() >= 0.999


def check(case: Case, dtype: torch.dtype) -> None:
    q, k, v, do = case.tensors(4, dtype)
    wide = [x.double() for x in (q, k, v, do)]
    assert_close(
        forward(case, q, k, v),
        reference.attention(q, k, v, **case.options),
        reference.attention(*wide[:3], **case.options),
    )
    ours = backward(case, q, k, v, do)
    same = reference.attention_backward(do, q, k, v, **case.options)
    exact = reference.attention_backward(wide[3], *wide[:3], **case.options)
    for mine, torchs, true in zip(ours, same, exact, strict=True):
        assert_close(mine, torchs, true)


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def published_table(heads: int, kernel_size: int) -> list[int]:
    flat = [slot * heads + head for head in range(heads) for slot in range(kernel_size)]
    return [number for i in flat for number in divmod(i, kernel_size)]


NAMED = {
    "stage 1": Case(heads=4),
    "stage 2": Case(heads=8, frames=4),
    "published": Case(heads=4, edge="zero", scale=1 / 64, table=published_table(4, 5)),
    "published 8 heads": Case(
        heads=8, frames=4, edge="zero", scale=1 / 64, table=published_table(8, 5)
    ),
    "one frame": Case(frames=1, head_dim=7),
    "one frame, zero edges": Case(frames=1, edge="zero"),
    "one of all": Case(outer=1, inner=1, heads=1, frames=1, head_dim=1, kernel_size=1),
    "even window": Case(kernel_size=4, frames=9, head_dim=24),
    "window of 2": Case(kernel_size=2, edge="zero", head_dim=3),
    "wider than the clip": Case(kernel_size=31, frames=5, heads=3),
    "wider than the clip, shifted": Case(kernel_size=31, frames=5, heads=3, edge="shift"),
    "long clip": Case(frames=130, kernel_size=17, heads=1, inner=1, head_dim=32),
    "dilated": Case(frames=19, dilation=3, heads=3, head_dim=40),
    "dilated, shifted": Case(frames=19, dilation=3, kernel_size=4, edge="shift", head_dim=16),
    "dilated beyond the clip": Case(frames=5, dilation=9),
    "causal": Case(causal=True, frames=11, head_dim=20),
    "causal, shifted": Case(causal=True, frames=11, edge="shift", kernel_size=6),
    "causal, dilated, zero": Case(causal=True, frames=11, edge="zero", dilation=2),
    "wide heads": Case(head_dim=257, heads=1, frames=6),
    "many heads": Case(heads=13, frames=3, head_dim=5, inner=1),
    # A table may read a slot twice, and leave a frame without any slot inside the clip.
    "repeating table": Case(
        heads=2, frames=3, kernel_size=3, edge="zero", table=[0, 0, 1, 0, 0, 0] * 2
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED.keys())
def test_matches_the_definition(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype)


@pytest.mark.parametrize("edge", EDGES)
def test_huge_windows_cost_nothing(edge: str, isa: str) -> None:
    small = Case(frames=5, kernel_size=11, edge="truncate" if edge == "zero" else edge)
    huge = replace(small, kernel_size=2**33 + 1, edge=edge)
    q, k, v = small.tensors(3, torch.float64)
    # With zero edges the slots outside, 2^33 of logit 0, keep the rest from having any weight.
    expected = torch.zeros_like(q) if edge == "zero" else forward(small, q, k, v)
    torch.testing.assert_close(forward(huge, q, k, v), expected, rtol=0, atol=1e-7)
    far = replace(small, dilation=2**35)
    assert torch.equal(forward(far, q, k, v), v)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 17, 64])
def test_matches_the_definition_over_windows(head_dim: int, dtype: torch.dtype, isa: str) -> None:
    for frames, size, dilation, causal, edge in itertools.product(
        (1, 4, 8, 33), (1, 2, 5, 9), (1, 3), (False, True), EDGES
    ):
        case = Case(  # enough sequences for the largest errors, ours and torch's, to be comparable
            outer=2,
            heads=3,
            inner=12,
            frames=frames,
            head_dim=head_dim,
            kernel_size=size,
            dilation=dilation,
            causal=causal,
            edge=edge,
        )
        check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stage 1", "published 8 heads", "dilated, shifted"])
def test_bitwise_equal_for_any_number_of_threads(name: str, dtype: torch.dtype, isa: str) -> None:
    case = NAMED[name]
    operands = case.tensors(4, dtype)
    runs = [
        (forward(case, *operands[:3], threads=n), *backward(case, *operands, threads=n))
        for n in (1, 2, 3, 5)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def channels_last_projection(case: Case, dtype: torch.dtype) -> Tensor:
    """(outer, inner, heads, 3, frames, head_dim) view of a (outer, frames, inner, channels)."""
    outer, inner, heads, frames, head_dim = case.shape
    packed = torch.randn(outer, frames, inner, heads, 3, head_dim).to(dtype)
    return packed.permute(0, 2, 3, 4, 1, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stage 1", "stage 2", "many heads", "published"])
def test_strided_views_are_read_and_written_in_place(
    name: str, dtype: torch.dtype, isa: str
) -> None:
    case = NAMED[name]
    q, k, v = channels_last_projection(case, dtype).unbind(3)
    dense = [x.contiguous() for x in (q, k, v)]
    o = torch.empty_like(q)  # keeps the order of the strides
    assert not o.is_contiguous() or case.frames == 1
    operands = [operand(x) for x in (q, k, v, o)]
    native.local_attention_forward(*problem(case, dtype), *operands, 2)
    assert torch.equal(o, forward(case, *dense))

    do = torch.randn_like(o)
    gradient = torch.full_like(channels_last_projection(case, dtype), torch.nan)
    operands = [operand(x) for x in (q, k, v, do, *gradient.unbind(3))]
    native.local_attention_backward(*problem(case, dtype), *operands, 2)
    for ours, expected in zip(
        gradient.unbind(3), backward(case, *dense, do.contiguous()), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_operands_is_touched(dtype: torch.dtype, isa: str) -> None:
    case = Case(heads=3, frames=5, head_dim=21)
    outer, inner, heads, frames, head_dim = case.shape
    room = [
        torch.full((outer, inner, heads, frames + 2, head_dim + 9), torch.nan, dtype=dtype)
        for _ in range(8)
    ]
    views = [x[..., 1:-1, 4:-5] for x in room]
    for view in views[:4]:
        view.copy_(torch.randn(case.shape))
    q, k, v, do, o, dq, dk, dv = views
    native.local_attention_forward(*problem(case, dtype), *map(operand, (q, k, v, o)), 2)
    native.local_attention_backward(
        *problem(case, dtype), *map(operand, (q, k, v, do, dq, dk, dv)), 2
    )
    for whole, view in zip(room, views, strict=True):
        assert view.isfinite().all()
        view.fill_(torch.nan)
        assert whole.isnan().all()
    assert do.shape == o.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype: torch.dtype, isa: str) -> None:
    case = Case(heads=1, frames=6, kernel_size=3, edge="zero", scale=1.0)
    q, k, v = case.tensors(3, dtype)
    large = 30.0  # logits around +-10^4: their exponentials over- and underflow
    ours = forward(case, q * large, k * large, v)
    exact = reference.attention(
        (q * large).double(), (k * large).double(), v.double(), **case.options
    )
    assert_close(ours, reference.attention(q * large, k * large, v, **case.options), exact)

    v[..., 0, 0] = torch.inf
    v[..., 5, 1] = torch.nan
    q[..., 2, 3] = torch.nan
    ours, expected = forward(case, q, k, v), reference.attention(q, k, v, **case.options)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_read_and_rounded_right(
    dtype: torch.dtype, isa: str
) -> None:
    case = Case(outer=1, inner=1, heads=1, frames=1, head_dim=2**16, kernel_size=1, scale=1.0)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    zero = torch.zeros(case.shape, dtype=dtype)
    ours = forward(case, zero, zero, every.view(case.shape)).flatten()
    number = ~every.isnan()
    # A sum that starts at +0 turns -0 into +0.
    assert torch.equal(ours[number], every[number])
    assert ours[~number].isnan().all()

    # Two equally likely frames: exact means of two numbers, rounded once, ties included.
    case = Case(outer=1, inner=1, heads=1, frames=2, head_dim=2**16, kernel_size=3, scale=1.0)
    pair = torch.stack([every, every.flip(0).roll(12345)]).view(case.shape)
    zero = torch.zeros(case.shape, dtype=dtype)
    ours = forward(case, zero, zero, pair)
    wide = pair.float()
    mean = (0.5 * wide[:, :, :, 0] + 0.5 * wide[:, :, :, 1]).to(dtype).unsqueeze(3)
    expected = mean.expand(case.shape)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("outer", [0, 2])
def test_empty_batches(outer: int, isa: str) -> None:
    case = Case(outer=outer, inner=0)
    q, k, v, do = case.tensors(4, torch.float32)
    assert forward(case, q, k, v).shape == case.shape
    assert backward(case, q, k, v, do)[0].shape == case.shape


GOOD = {
    "dtype": "float32",
    "sizes": (2, 3, 2, 8, 64),
    "window": (5, 1, 0, 1),
    "scale": 0.125,
    "key_table": [],
    "threads": 2,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"sizes": (-1, 3, 2, 8, 64)}, "outer must be at least 0, got -1"),
        ({"sizes": (2, -3, 2, 8, 64)}, "inner must be at least 0, got -3"),
        ({"sizes": (2, 3, 0, 8, 64)}, "heads must be at least 1, got 0"),
        ({"sizes": (2, 3, 2, 0, 64)}, "frames must be at least 1, got 0"),
        ({"sizes": (2, 3, 2, 8, 0)}, "head_dim must be at least 1, got 0"),
        ({"sizes": (2**39, 2**39, 2, 8, 64)}, "fits into memory"),
        ({"sizes": (2**41, 1, 2, 8, 64)}, r"outer must be less than 2\*\*40"),
        ({"window": (0, 1, 0, 0)}, "kernel_size must be at least 1, got 0"),
        ({"window": (5, 0, 0, 0)}, "dilation must be at least 1, got 0"),
        ({"window": (5, 1, 2, 0)}, "causal must be 0 or 1, got 2"),
        ({"window": (5, 1, 0, 3)}, "edge must be 0 .* got 3"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"key_table": [0, 0]}, "key_table must have heads"),
        ({"key_table": [2, 0] * 10}, "key_table head must be one of the heads, got 2"),
        ({"key_table": [0, 5] * 10}, "key_table slot must be in the window, got 5"),
        ({"key_table": [0, -1] * 10}, "key_table slot must be in the window, got -1"),
        ({"key_table": [0, 0] * 10, "window": (5, 1, 1, 1)}, "key_table needs"),
        ({"key_table": [0, 0] * 10, "window": (5, 2, 0, 1)}, "key_table needs"),
        ({"key_table": [0, 0] * 10, "window": (5, 1, 0, 0)}, "key_table needs"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"o": (0, 1, 1, 1, 1)}, "o must not be a null pointer"),
    ],
)
def test_bad_arguments_raise_before_memory_is_touched(change: dict, words: str) -> None:
    x = torch.zeros(GOOD["sizes"])
    operands = {name: operand(x) for name in ("q", "k", "v", "o")}
    with pytest.raises(ValueError, match=words):
        native.local_attention_forward(**{**GOOD, **operands, **change})
    if "o" in change:
        change, words = {"do": change["o"]}, "do must"
    operands = {name: operand(x) for name in ("q", "k", "v", "do", "dq", "dk", "dv")}
    with pytest.raises(ValueError, match=words):
        native.local_attention_backward(**{**GOOD, **operands, **change})


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="isa 'mmx' can't run"):
        native.set_isa("mmx")
