"""Problems and tolerances for tests of the projection per head with the attention after it."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    bias: bool = True
    kernel_size: int = 5
    dilation: int = 1
    causal: bool = False
    edge: str = "truncate"
    sliced: bool = False

    def options(self, backend: str) -> Options:
        return Options(self.kernel_size, self.dilation, self.causal, None, self.edge, (), backend)

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x, weight, bias and the gradient of the output."""
        shape = (self.batch, self.frames, self.positions, self.heads * self.head_dim)
        x, grad = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
        if self.sliced:
            x = torch.cat((x, x), -2)[:, :, : self.positions]
        weight = torch.randn(self.heads, 3 * self.head_dim, self.head_dim) * self.head_dim**-0.5
        bias = torch.randn(self.heads, 3 * self.head_dim).to(dtype).to(device)
        return x, weight.to(dtype).to(device), bias if self.bias else None, grad

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{key}={value}" for key, value in changed.items()) or "default"


CASES = (
    Case(),
    Case(frames=1),
    Case(frames=3, kernel_size=9, bias=False),
    Case(frames=4, heads=8, positions=3),
    Case(frames=16, head_dim=32, edge="shift", dilation=2, heads=1),
    Case(frames=7, head_dim=16, edge="zero", causal=True, heads=3, kernel_size=4),
    Case(batch=1, positions=70, frames=2, heads=1, head_dim=16),
    Case(sliced=True),
)


def run(
    backend: str, operands: tuple[Tensor | None, ...], options: Options, grad: Tensor
) -> list[Tensor]:
    """Output and gradients of a backend or of the "definition"."""
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format)
              .requires_grad_() for t in operands]  # fmt: skip
    if backend == "definition":
        output = reference.qkv_attention(*leaves, **options.definition())
    else:
        output = op.qkv_attention(*leaves, options)
    given = [t for t in leaves if t is not None]
    return [t.detach().cpu() for t in (output, *torch.autograd.grad(output, given, grad))]


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """The error is at most twice that of the separate operations, plus two roundings.

    Both round q, k and v, and their gradients, to the dtype in between.
    """
    *operands, grad = case.tensors(dtype, device)
    ours = run(backend, tuple(operands), case.options(backend), grad)
    separate = run("reference", tuple(operands), case.options("reference"), grad)
    wide = tuple(None if t is None else t.double().cpu() for t in operands)
    exact = run("definition", wide, case.options(""), grad.double().cpu())
    for name, a, b, c in zip(
        ("output", "dx", "dweight", "dbias"), ours, separate, exact, strict=False
    ):
        assert a.isfinite().all(), name
        error, other = ((t.double() - c).abs().max().item() for t in (a, b))
        limit = 2 * other + 2 * torch.finfo(dtype).eps * c.abs().max().item()
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"
