"""float16 on a CPU: results of float32 rounded once, and nothing but half tensors kept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d_kernels.half_storage import HalfStorage, applies, half_storage

VIDEO, IMAGE, LINE = (2, 4, 4, 6, 5), (2, 4, 6, 5), (2, 4, 9)


def case(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple:
    return function, shapes


CASES = {
    "conv1d": case(lambda x, w, b: F.conv1d(x, w, b, padding=1), LINE, (6, 4, 3), (6,)),
    "conv2d, channels last": case(
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w, stride=(2, 1)),
        IMAGE, (6, 4, 3, 2),
    ),
    "conv2d, padding by name": case(
        lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, (6, 4, 3, 3)
    ),
    "conv2d, one image": case(lambda x, w: F.conv2d(x[0], w), IMAGE, (6, 4, 3, 3)),
    "conv3d, groups": case(
        lambda x, w, b: F.conv3d(x, w, b, padding=1, dilation=(1, 1, 2), groups=2),
        VIDEO, (6, 2, 3, 3, 2), (6,),
    ),
    "conv_transpose3d": case(
        lambda x, w, b: F.conv_transpose3d(x, w, b, stride=2, output_padding=1, groups=2),
        VIDEO, (4, 3, 3, 3, 3), (6,),
    ),
    "linear": case(F.linear, IMAGE, (7, 5), (7,)),
    "linear, no bias": case(F.linear, LINE, (7, 9)),
    "batch_norm": case(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), VIDEO, (4,), (4,)
    ),
    "layer_norm": case(lambda x, w: F.layer_norm(x, (5,), w), IMAGE, (5,)),
    "group_norm": case(lambda x: F.group_norm(x, 2), IMAGE),
    "softmax": case(lambda x: x.softmax(-1), IMAGE),
    "log_softmax": case(lambda x: F.log_softmax(x, 1), IMAGE),
    "matmul": case(lambda x, y: x @ y, (3, 4, 5), (5, 2)),
    "bmm": case(torch.bmm, (3, 4, 5), (3, 5, 2)),
    "einsum": case(lambda x, y: torch.einsum("bij,bkj->bik", x, y), (3, 4, 5), (3, 2, 5)),
    "attention": case(F.scaled_dot_product_attention, *[(2, 3, 6, 8)] * 3),
    "avg_pool3d": case(lambda x: F.avg_pool3d(x, 2), VIDEO),
    "max_pool3d": case(lambda x: F.max_pool3d(x, 2), VIDEO),
    "gelu": case(F.gelu, IMAGE),
}  # fmt: skip


def draw(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    return [torch.randn(shape).half() for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_float32_rounded_once(name: str) -> None:
    function, shapes = CASES[name]
    half = [x.requires_grad_() for x in draw(shapes)]
    wide = [x.detach().float().requires_grad_() for x in half]
    exact = function(*wide)
    with HalfStorage():
        ours = function(*half)
    grad = torch.randn(exact.shape).half()
    pairs = zip(
        (ours, *torch.autograd.grad(ours, half, grad)),
        (exact, *torch.autograd.grad(exact, wide, grad.float())),
        strict=True,
    )
    for mine, truth in pairs:
        assert mine.dtype == torch.float16
        # One ulp: oneDNN may sum in another order when only one gradient is asked for.
        limit = 2**-10 * truth.abs() + 2**-13 * truth.abs().max()
        assert bool(((mine.float() - truth).abs() <= limit).all())


@pytest.mark.parametrize("name", [name for name in CASES if name != "max_pool3d"])
def test_only_half_tensors_are_kept(name: str) -> None:
    function, shapes = CASES[name]
    kept: list[Tensor] = []
    with HalfStorage(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        function(*(x.requires_grad_() for x in draw(shapes)))
    assert kept
    assert {x.dtype for x in kept} == {torch.float16}


def test_a_result_may_be_missing() -> None:
    """`nn.MultiheadAttention` returns None in place of the weights that nobody asked for."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True).half()
    wide = nn.MultiheadAttention(8, 2, batch_first=True)
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8).half()
    exact = wide(*[x.float()] * 3, need_weights=False)[0]
    with HalfStorage():
        ours, weights = layer(x, x, x, need_weights=False)
    assert weights is None
    assert torch.allclose(ours.float(), exact, rtol=2e-3, atol=2e-3)
    (found,) = torch.autograd.grad(ours.sum(), layer.in_proj_weight)
    (truth,) = torch.autograd.grad(exact.sum(), wide.in_proj_weight)
    assert torch.allclose(found.float(), truth, rtol=2e-3, atol=2e-3)


def test_a_network_trains_as_in_float32() -> None:
    network = nn.Sequential(
        nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(),
        nn.Linear(4 * 2 * 3 * 3, 3),
    )  # fmt: skip
    half = nn.Sequential(*(type(m)(*_made_of(m)) for m in network)).half()
    network.load_state_dict(half.state_dict())
    clips = torch.randn(3, 2, 6, 8, 8).half()
    with HalfStorage():
        half(clips).square().sum().backward()
    network(clips.float()).square().sum().backward()
    largest = max(x.grad.abs().max() for x in network.parameters())
    for ours, exact in zip(half.parameters(), network.parameters(), strict=True):
        assert (ours.grad.float() - exact.grad).abs().max() <= 0.005 * largest
    for ours, exact in zip(half.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(ours.to(exact.dtype), exact, rtol=2e-3, atol=1e-4)


def _made_of(module: nn.Module) -> tuple:
    return {
        nn.Conv3d: (2, 4, 3), nn.BatchNorm3d: (4,), nn.AvgPool3d: (2,), nn.Linear: (72, 3),
    }.get(type(module), ())  # fmt: skip


def test_random_functions_draw_once() -> None:
    q = torch.randn(1, 2, 6, 8).half().requires_grad_()
    torch.manual_seed(3)
    with HalfStorage():
        ours = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    state = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(ours.sum(), q)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    wide = q.detach().float().requires_grad_()
    exact = F.scaled_dot_product_attention(wide, wide, wide, dropout_p=0.5)
    (truth,) = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(ours.float(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradient.float(), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["conv3d, groups", "linear", "avg_pool3d", "softmax"])
def test_second_derivatives(name: str) -> None:
    function, shapes = CASES[name]
    half = [x.mul_(0.1).requires_grad_() for x in draw(shapes)]
    wide = [x.detach().float().requires_grad_() for x in half]
    second = []
    for inputs in (half, wide):
        with HalfStorage():
            value = function(*inputs).square().sum()
            (gradient,) = torch.autograd.grad(value, inputs[0], create_graph=True)
            second.append(torch.autograd.grad(gradient.square().sum(), inputs[0])[0])
    scale = second[1].abs().max()
    assert (second[0].float() - second[1]).abs().max() <= 0.01 * scale


def test_transforms_and_compilation() -> None:
    pool = half_storage(F.avg_pool3d)
    x = torch.randn(3, *VIDEO).half()
    expected = torch.stack([pool(slice, 2) for slice in x])
    assert torch.equal(torch.func.vmap(pool, in_dims=(0, None))(x, 2), expected)
    compiled = torch.compile(lambda x: pool(x, 2), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x[0]), expected[0])


def test_everything_else_is_left_alone() -> None:
    x = torch.randn(2, 5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y, w = x.to(dtype), torch.randn(3, 5, dtype=dtype)
        with HalfStorage():
            assert torch.equal(F.linear(y, w), half_storage(F.linear)(y, w))
            assert F.linear(y, w).dtype == dtype
    assert not applies((x, 1.0, "text", None))
    assert applies(([x.half()],))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), HalfStorage():
        F.linear(torch.ones(2, 3).half(), torch.ones(2, 4).half())
