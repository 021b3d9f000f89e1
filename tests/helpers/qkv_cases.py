"""Problems and tolerances for tests of the projection per head with the attention after it."""

from dataclasses import dataclass

import torch
from attention_cases import random_key_table
from torch import Tensor

from ca3d_kernels import published_key_table
from ca3d_kernels.local_attention.functional import check_options
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.qkv_attention import op, reference


@dataclass(frozen=True)
class Case:
    """One problem."""

    frames: int = 8
    heads: int = 2
    head_dim: int = 64
    positions: int = 5
    batch: int = 2
    bias: str = "head"
    kernel_size: int = 5
    dilation: int = 1
    causal: bool = False
    edge: str = "truncate"
    table: str = "own"
    scale: float | None = None
    sliced: bool = False
    # Of every query with every key; None draws them.
    logit: float | None = None

    def options(self, backend: str) -> Options:
        rows = None
        if self.table == "published":
            rows = published_key_table(self.heads, self.kernel_size)
        elif self.table == "random":
            rows = random_key_table(self.heads, self.kernel_size)
        return check_options(
            self.heads, self.kernel_size, self.dilation, self.causal, self.scale, self.edge, rows,
            backend or None,
        )  # fmt: skip

    @property
    def fused_backward(self) -> bool:
        """Whether the fused kernels have a backward pass for it."""
        return self.bias != "frame"

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x, weight, bias and the gradient of the output."""
        shape = (self.batch, self.frames, self.positions, self.heads * self.head_dim)
        x, grad = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
        if self.sliced:
            x = torch.cat((x, x), -2)[:, :, : self.positions]
        weight = torch.randn(self.heads, 3 * self.head_dim, self.head_dim) * self.head_dim**-0.5
        per_frame = (self.frames,) if self.bias == "frame" else ()
        bias = torch.randn(self.heads, *per_frame, 3 * self.head_dim)
        if self.logit is not None:
            weight[:, : 2 * self.head_dim] = 0
            bias[..., : self.head_dim] = 4
            bias[..., self.head_dim : 2 * self.head_dim] = self.logit / (4 * self.head_dim**0.5)
        bias = bias.to(dtype).to(device)
        return x, weight.to(dtype).to(device), None if self.bias == "none" else bias, grad

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{key}={value}" for key, value in changed.items()) or "default"


CASES = (
    Case(),
    Case(frames=1),
    Case(frames=3, kernel_size=9, bias="none"),
    Case(frames=4, heads=8, positions=3),
    Case(frames=16, head_dim=32, edge="shift", dilation=2, heads=1),
    Case(frames=7, head_dim=16, edge="zero", causal=True, heads=3, kernel_size=4),
    Case(batch=1, positions=70, frames=2, heads=1, head_dim=16),
    Case(sliced=True),
    Case(bias="frame", edge="zero"),
    Case(bias="frame", frames=5, head_dim=16, sliced=True, scale=-0.3),
    Case(frames=27, head_dim=32, heads=1, positions=3),
    Case(frames=64, head_dim=16, positions=2, batch=1),
    Case(frames=70, head_dim=16, heads=1, positions=2, edge="shift", kernel_size=3),
    Case(frames=50, head_dim=16, heads=1, positions=2, causal=True, kernel_size=2, dilation=3),
    Case(frames=40, bias="frame", head_dim=16, heads=1, positions=3, edge="zero", kernel_size=4),
    Case(heads=4, edge="zero", table="published", scale=1 / 64),
    Case(heads=8, frames=4, edge="zero", table="published", bias="frame", positions=3),
    Case(heads=3, frames=7, edge="zero", table="random", head_dim=32, bias="none", sliced=True),
    Case(heads=2, frames=1, edge="zero", table="random", head_dim=16, kernel_size=4),
    Case(heads=5, frames=3, edge="zero", table="published", head_dim=16, kernel_size=9),
    # Exponentials of these leave float32.
    Case(head_dim=16, logit=-120.0),
    Case(head_dim=16, logit=120.0),
    Case(head_dim=16, logit=-120.0, edge="zero"),
    Case(head_dim=16, logit=-120.0, edge="zero", table="published"),
)


def run(
    backend: str, operands: tuple[Tensor | None, ...], options: Options, grad: Tensor | None
) -> list[Tensor]:
    """Output and gradients of a backend or of the "definition"; without grad the output alone."""
    leaves = [None if t is None else t.detach().requires_grad_(grad is not None) for t in operands]
    if backend == "definition":
        output = reference.qkv_attention(*leaves, **options.definition())
    else:
        output = op.qkv_attention(*leaves, options)
    given = [t for t in leaves if t is not None]
    gradients = () if grad is None else torch.autograd.grad(output, given, grad)
    return [t.detach().cpu() for t in (output, *gradients)]


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """The error is at most twice that of the separate operations, plus two roundings.

    Both round q, k and v, and their gradients, to the dtype in between. Where the fused kernels
    have no backward pass, the output alone is compared.
    """
    *operands, grad = case.tensors(dtype, device)
    if backend == "triton" and not case.fused_backward:
        grad = None
    ours = run(backend, tuple(operands), case.options(backend), grad)
    separate = run("reference", tuple(operands), case.options("reference"), grad)
    wide = tuple(None if t is None else t.double().cpu() for t in operands)
    exact = run("definition", wide, case.options(""), None if grad is None else grad.double().cpu())
    for name, a, b, c in zip(
        ("output", "dx", "dweight", "dbias"), ours, separate, exact, strict=False
    ):
        assert a.isfinite().all(), name
        error, other = ((t.double() - c).abs().max().item() for t in (a, b))
        limit = 2 * other + 2 * torch.finfo(dtype).eps * c.abs().max().item()
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"
