"""The definition itself, against loops written from its words and against autograd."""

import itertools
import math

import pytest
import torch
from attention_cases import NAMED, Problem, define, define_extended, operands
from torch import Tensor

from ca3d_kernels.local_attention import reference

EDGES = ("truncate", "zero", "shift")


def sources_in_words(
    t: int, frames: int, kernel_size: int, dilation: int, causal: bool, edge: str
) -> list[int | None]:
    """Frames of t's window; None for a slot that counts as a zero key and value."""
    if causal:
        window = [t - (kernel_size - 1 - n) * dilation for n in range(kernel_size)]
    else:
        window = [t + (n - kernel_size // 2) * dilation for n in range(kernel_size)]
    if edge == "zero":
        return [s if 0 <= s < frames else None for s in window]
    if edge == "shift" and not causal:
        reachable = [s for s in range(frames) if s % dilation == t % dilation]
        if len(reachable) <= kernel_size:
            return list(reachable)
        while window[0] < 0:
            window = [s + dilation for s in window]
        while window[-1] >= frames:
            window = [s - dilation for s in window]
        return list(window)
    return [s for s in window if 0 <= s < frames]


def attend_in_words(q: Tensor, k: Tensor, v: Tensor, scale: float, **window: object) -> Tensor:
    heads, frames, _ = q.shape
    output = torch.zeros_like(v)
    for h, t in itertools.product(range(heads), range(frames)):
        sources = sources_in_words(t, frames, **window)
        logits = [0.0 if s is None else scale * torch.dot(q[h, t], k[h, s]) for s in sources]
        weights = [math.exp(x) for x in logits]
        for weight, s in zip(weights, sources, strict=True):
            if s is not None:
                output[h, t] += weight / sum(weights) * v[h, s]
    return output


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_agrees_with_the_words(dilation: int, causal: bool, edge: str) -> None:
    for frames, kernel_size in itertools.product((1, 2, 4, 7), (1, 2, 3, 4, 5, 9)):
        window = {
            "kernel_size": kernel_size, "dilation": dilation, "causal": causal, "edge": edge,
        }  # fmt: skip
        q, k, v = torch.randn(3, 2, frames, 3, dtype=torch.float64)
        expected = attend_in_words(q, k, v, 0.7, **window)
        torch.testing.assert_close(
            reference.attention(q, k, v, scale=0.7, **window), expected, rtol=1e-12, atol=1e-12
        )


def test_key_table_reads_the_named_head_and_slot() -> None:
    q, k, v = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    table = [1, 2, 0, 0, 0, 1, 1, 1, 1, 1, 0, 2]
    output = reference.attention(q, k, v, kernel_size=3, edge="zero", scale=0.5, key_table=table)
    # Frame 3 of head 0: slots are head 1 one frame later (outside), head 0 one frame earlier, head
    # 0 at the same frame.
    logits = torch.stack([torch.zeros(()), 0.5 * q[0, 3] @ k[0, 2], 0.5 * q[0, 3] @ k[0, 3]])
    p = logits.softmax(0)
    torch.testing.assert_close(output[0, 3], p[1] * v[0, 2] + p[2] * v[0, 3])


@pytest.mark.parametrize("problem", NAMED.values(), ids=NAMED.keys())
def test_agrees_with_long_double_loops(problem: Problem) -> None:
    inputs = [x.double() for x in operands(problem)]
    for ours, theirs in zip(
        define(problem, *inputs), define_extended(problem, *inputs), strict=True
    ):
        torch.testing.assert_close(
            ours, torch.from_numpy(theirs.astype("float64")), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("problem", NAMED.values(), ids=NAMED.keys())
def test_backward_is_the_derivative(problem: Problem) -> None:
    *leaves, grad = (x.double() for x in operands(problem))
    leaves = [x.detach().requires_grad_() for x in leaves]
    options = problem.definition_options()
    expected = torch.autograd.grad(reference.attention(*leaves, **options), leaves, grad)
    ours = reference.attention_backward(grad, *leaves, **options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    inputs = operands(Problem(dtype=dtype))
    wide = define(Problem(dtype=dtype), *(x.float() for x in inputs))
    for ours, exact in zip(define(Problem(dtype=dtype), *inputs), wide, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, exact.to(dtype))


def test_weights_are_those_of_the_output() -> None:
    q, k, v = torch.randn(3, 2, 4, 8, 16, dtype=torch.float64)
    for edge in EDGES:
        weights = reference.attention_weights(q, k, kernel_size=3, edge=edge)
        frames, inside = reference.window_frames(8, kernel_size=3, edge=edge)
        assert weights.shape == (2, 4, 8, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 8, dtype=torch.float64))
        values = v[..., frames.clamp(0, 7), :] * inside.unsqueeze(-1)
        output = (weights.unsqueeze(-1) * values).sum(-2)
        expected = reference.attention(q, k, v, kernel_size=3, edge=edge)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        assert (weights[..., ~inside] == 0).all() == (edge != "zero") or inside.all()
