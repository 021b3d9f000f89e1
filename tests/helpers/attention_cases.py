"""Problems, layouts and tolerances for tests of local temporal attention on any backend."""

import contextlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ca3d_kernels import (
    backends,
    local_temporal_attention,
    local_temporal_attention_packed,
    published_key_table,
)
from ca3d_kernels.local_attention import reference
from ca3d_kernels.triton_launch import interpreted

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels-last", "sliced", "expanded", "transposed")


@dataclass(frozen=True)
class Problem:
    """One attention problem; q, k, v and the gradient are drawn from the random state."""

    frames: int = 8
    kernel_size: int = 5
    dilation: int = 1
    causal: bool = False
    scale: float | None = None
    edge: str = "truncate"
    table: str = "own"
    heads: int = 4
    head_dim: int = 16
    lead: tuple[int, ...] = (2, 3)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    packed: bool = False
    device: str = "cpu"

    def options(self) -> dict:
        tables = {
            "own": lambda: None,
            "published": lambda: published_key_table(self.heads, self.kernel_size),
            "random": lambda: random_key_table(self.heads, self.kernel_size),
        }
        return {
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "causal": self.causal,
            "scale": self.scale,
            "edge": self.edge,
            "key_table": tables[self.table](),
        }

    def definition_options(self) -> dict:
        """The options for the functions of `reference`, which take a flat key table."""
        options = self.options()
        if options["key_table"] is not None:
            rows = options["key_table"]
            options["key_table"] = [x for row in rows for pair in row for x in pair]
        return options

    def __str__(self) -> str:
        default = Problem()
        changed = {
            name: value
            for name, value in vars(self).items()
            if value != getattr(default, name) or name == "dtype"
        }
        text = ",".join(f"{name}={value}" for name, value in changed.items())
        return text.replace("torch.", "").replace(" ", "")


def allowed(case: dict) -> bool:
    """Whether the options of a case go together."""
    own = case["table"] == "own"
    return own or (case["edge"] == "zero" and case["dilation"] == 1 and not case["causal"])


PARAMETERS = {
    "frames": (1, 2, 3, 4, 7, 8, 16, 33, 64),
    "kernel_size": (1, 2, 3, 4, 5, 6, 7, 9),
    "dilation": (1, 2, 3),
    "causal": (False, True),
    "scale": (None, 0.05, -0.5),
    "edge": ("truncate", "zero", "shift"),
    "table": ("own", "published", "random"),
    "heads": (1, 3, 4, 8),
    "head_dim": (8, 16, 20, 64, 128),
    "lead": ((), (3,), (2, 3), (2, 1, 3)),
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "grad_layout": LAYOUTS,
    "packed": (False, True),
}


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs its block with the given number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_key_table(heads: int, kernel_size: int) -> list[list[list[int]]]:
    """A key table without structure: heads and slots repeat, some are never read."""
    rng = random.Random(heads * 100 + kernel_size)
    return [
        [[rng.randrange(heads), rng.randrange(kernel_size)] for _ in range(kernel_size)]
        for _ in range(heads)
    ]


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The values of x, (..., T, head_dim) with any dimensions before, in the named strides.

    ``expanded`` repeats the first slice of the first dimension, so it changes the values.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels-last":
        # T slower than everything that follows the first dimension, as in a projection's output.
        return x.movedim(-2, 0).contiguous().movedim(0, -2)
    if layout == "sliced":
        wide = torch.full([n + 3 for n in x.shape], math.nan, dtype=x.dtype, device=x.device)
        view = wide[tuple(slice(1, n + 1) for n in x.shape)]
        return view.copy_(x)
    if layout == "expanded":
        return x[:1].contiguous().expand_as(x) if x.dim() > 3 else x[..., :1].expand_as(x)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(layout)


def operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the incoming gradient, in the problem's layouts."""
    shape = (*problem.lead, problem.heads, 3, problem.frames, problem.head_dim)
    # Drawn on the CPU: the same numbers on every device.
    qkv = torch.randn(shape).to(problem.dtype).to(problem.device)
    qkv = with_layout(qkv, problem.layout)
    grad = torch.randn((*problem.lead, problem.heads, *shape[-2:])).to(problem.dtype)
    grad = grad.to(problem.device)
    return *qkv.unbind(-3), with_layout(grad, problem.grad_layout)


def run(
    problem: Problem, backend: str, workers: int = 2
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Output and gradients of a backend, and the operands that they belong to."""
    q, k, v, grad = operands(problem)
    options = {**problem.options(), "backend": backend}
    with threads(workers):
        if problem.packed:
            # The slices of one tensor, whose strides the packed op sees.
            qkv = torch.stack((q, k, v), -3)
            qkv = with_layout(qkv, problem.layout).detach().requires_grad_()
            output = local_temporal_attention_packed(qkv, **options)
            (gradient,) = torch.autograd.grad(output, qkv, grad)
            results = [output.detach(), *gradient.unbind(-3)]
        else:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            output = local_temporal_attention(*leaves, **options)
            results = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    return [x.cpu() for x in results], tuple(x.cpu() for x in (q, k, v, grad))


def define(problem: Problem, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients by the definition, in the dtype of the operands."""
    options = problem.definition_options()
    output = reference.attention(q, k, v, **options)
    return [output, *reference.attention_backward(grad, q, k, v, **options)]


def define_extended(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> list[np.ndarray]:
    """Output and gradients in numpy's long double: the truth for float64 results.

    Written with one loop over frames and slots, independently of `reference`.
    """
    query, key, value, do = (x.detach().numpy().astype(np.longdouble) for x in (q, k, v, grad))
    options, heads = problem.definition_options(), range(problem.heads)
    scale = problem.head_dim ** np.longdouble(-0.5) if problem.scale is None else problem.scale
    frames, inside = reference.window_frames(
        problem.frames, problem.kernel_size, problem.dilation, problem.causal, problem.edge
    )
    table = options["key_table"] or [
        x for h in heads for n in range(problem.kernel_size) for x in (h, n)
    ]
    results = [np.zeros_like(query) for _ in range(4)]
    output, dq, dk, dv = results
    for h, t in itertools.product(heads, range(problem.frames)):
        pairs = table[2 * problem.kernel_size * h :][: 2 * problem.kernel_size]
        slots = list(zip(pairs[0::2], pairs[1::2], strict=True))
        sources = [(g, int(frames[t, n])) if inside[t, n] else None for g, n in slots]
        if problem.edge != "zero":
            sources = [source for source in sources if source]
        at = query[..., h, t, :]
        nothing = np.zeros_like(at)
        keys = [key[..., s[0], s[1], :] if s else nothing for s in sources]
        values = [value[..., s[0], s[1], :] if s else nothing for s in sources]
        logits = np.stack([scale * (at * x).sum(-1) for x in keys], -1)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        dp = np.stack([(do[..., h, t, :] * x).sum(-1) for x in values], -1)
        ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
        for n, source in enumerate(sources):
            output[..., h, t, :] += p[..., n, None] * values[n]
            dq[..., h, t, :] += ds[..., n, None] * keys[n]
            if source:
                dk[..., source[0], source[1], :] += ds[..., n, None] * at
                dv[..., source[0], source[1], :] += p[..., n, None] * do[..., h, t, :]
    return results


def units_in_last_place(ours: Tensor, exact: Tensor) -> Tensor:
    """How many representable half-precision numbers lie between ours and the rounded exact one."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(ours) - ordered(exact.to(ours.dtype))).abs()


def errors(
    ours: Tensor, same_dtype: Tensor, exact: Tensor | np.ndarray
) -> tuple[float, float, float]:
    """Largest error of ours and of plain torch in the same dtype, and the largest exact value."""
    assert ours.dtype == same_dtype.dtype
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all(), "not everything is finite"
    if not ours.numel():
        return 0.0, 0.0, 0.0
    truth = exact if isinstance(exact, np.ndarray) else exact.numpy()
    error, torch_error = (abs(x.double().numpy() - truth).max() for x in (ours, same_dtype))
    return float(error), float(torch_error), float(abs(truth).max())


def assert_rounded(name: str, ours: Tensor, exact: Tensor) -> None:
    """99.9 % of the elements are within one unit in the last place of the rounded exact result.

    An element that cancels to nearly zero counts as right within two float32 roundings of the
    largest value: the sums are float32 and can't hold it better.
    """
    if ours.numel():
        resolution = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
        off = (units_in_last_place(ours, exact) > 1) & ((ours - exact).abs() > resolution)
        count = off.sum().item()
        assert count <= ours.numel() / 1000, f"{name}: {count} of {ours.numel()} off by over 1 ulp"


def compare(
    problem: Problem, backend: str
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | np.ndarray]]:
    """Name, result, plain torch's result in the same dtype, and the truth, of output and gradients.

    The truth is the definition in float64, for float64 in long double.
    """
    results, inputs = run(problem, backend)
    if problem.dtype == torch.float64:
        exact = define_extended(problem, *inputs)
    else:
        exact = define(problem, *(x.double() for x in inputs))
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    yield from zip(names, results, define(problem, *inputs), exact, strict=True)


def assert_close(name: str, ours: Tensor, same_dtype: Tensor, exact: Tensor | np.ndarray) -> None:
    """The error is at most twice that of plain torch in the same dtype plus two roundings of the
    largest value."""
    error, torch_error, largest = errors(ours, same_dtype, exact)
    limit = 2 * torch_error + 2 * torch.finfo(ours.dtype).eps * largest
    assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def check(problem: Problem, backend: str) -> None:
    """Runs a problem, forward and backward, and holds the results to the project's policy.

    They pass `assert_close`, and in half precision also `assert_rounded`.
    """
    for name, ours, same_dtype, exact in compare(problem, backend):
        assert_close(name, ours, same_dtype, exact)
        if problem.dtype in (torch.float16, torch.bfloat16):
            assert_rounded(name, ours, exact)


def triton_takes(problem: Problem) -> bool:
    """Whether the documented limits of the Triton kernels allow a problem, forward and backward."""
    if problem.dtype == torch.float64 or problem.head_dim > 128:
        return False
    narrow, table = problem.head_dim <= 64, problem.table != "own"
    if problem.dtype == torch.float32:
        rows = 32 if narrow else 16
    else:
        rows = 64 if narrow and not table else 32
    sequences = 1 << (problem.heads - 1).bit_length() if table else 1
    if sequences << (problem.frames - 1).bit_length() <= rows:
        return True
    length = -(-problem.frames // problem.dilation)  # of a clip's frames that meet
    before = problem.kernel_size - 1 if problem.causal else problem.kernel_size // 2
    behind = problem.kernel_size - 1 - before
    if problem.edge == "shift" and not problem.causal:
        before = behind = problem.kernel_size - 1
    span = max(16, rows // 2) // sequences
    return 0 < span >= min(before, length - 1) + min(behind, length - 1)


NAMED = {
    "one frame": Problem(frames=1),
    "one frame, shifted": Problem(frames=1, edge="shift", kernel_size=4),
    "one frame, zeros": Problem(frames=1, edge="zero", kernel_size=9),
    "window of one": Problem(kernel_size=1),
    "window wider than the clip": Problem(frames=4, kernel_size=9, lead=(2, 49), heads=8),
    "window far wider than the clip": Problem(frames=3, kernel_size=101, edge="shift"),
    "even window": Problem(kernel_size=4),
    "dilation beyond the clip": Problem(frames=4, dilation=9),
    "dilated, shifted, classes of unequal length": Problem(
        frames=11, dilation=3, kernel_size=3, edge="shift"
    ),
    "causal, shifted": Problem(causal=True, edge="shift"),
    "far longer than a tile": Problem(frames=150, heads=1, lead=(2,), head_dim=8),
    "long, dilated, shifted, classes of unequal length": Problem(
        frames=101, dilation=3, edge="shift", heads=1, lead=()
    ),
    "long, windows wider than the dilation leaves frames": Problem(
        frames=70, kernel_size=41, dilation=10, heads=1, lead=()
    ),
    "long, causal, zeros": Problem(frames=70, causal=True, edge="zero", heads=2, lead=()),
    "long, as wide a window as tiles allow": Problem(
        frames=70, kernel_size=17, heads=1, lead=(), head_dim=128, layout="channels-last"
    ),
    "longer than a program goes, in float32": Problem(
        frames=530, heads=1, lead=(), head_dim=8, dtype=torch.float32
    ),
    "long, published": Problem(frames=20, edge="zero", table="published", lead=()),
    "published, 4 heads": Problem(edge="zero", table="published", scale=1 / 16),
    "published, 8 heads, 4 frames": Problem(frames=4, heads=8, edge="zero", table="published"),
    "published, heads and window share a factor": Problem(
        heads=6, kernel_size=3, edge="zero", table="published"
    ),
    "head_dim 1": Problem(head_dim=1),
    "odd head_dim": Problem(head_dim=13),
    "wide head_dim": Problem(head_dim=160),
    "no leading dimensions": Problem(lead=()),
    "five leading dimensions": Problem(lead=(2, 1, 2, 3, 1), layout="channels-last"),
    "all size one": Problem(lead=(1, 1), heads=1, frames=1, head_dim=1),
    "scale zero": Problem(scale=0.0),
    "sliced operands, expanded gradient": Problem(layout="sliced", grad_layout="expanded"),
    "transposed operands and gradient": Problem(layout="transposed", grad_layout="transposed"),
}


def backends_here() -> list:
    """The backends that can run CPU tensors in this process, as pytest parameters.

    Where Triton's interpreter is active, that is what the process is there to test.
    """
    if interpreted():
        return [pytest.param("triton")]
    reasons = backends.explain("local_attention", "cpu")
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
        for name, reason in reasons.items()
    ]


def vary(problem: Problem, **changes: object) -> Problem:
    """The problem with some fields changed."""
    return replace(problem, **changes)
