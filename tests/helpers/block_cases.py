"""Problems and tolerances for tests of the folded temporal half and of the folded convolution."""

from dataclasses import dataclass
from typing import Any

import torch
from attention_cases import random_key_table
from torch import Tensor

from ca3d_kernels import published_key_table, temporal_block
from ca3d_kernels.temporal_block.op import Weights

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One problem of the temporal half."""

    frames: int = 8
    heads: int = 2
    head_dim: int = 64
    positions: int = 5
    batch: int = 2
    blocks: int = 2
    kernel_size: int = 5
    dilation: int = 1
    causal: bool = False
    edge: str = "truncate"
    table: str = "own"
    scale: float | None = None
    sliced: bool = False
    # Of every query with every key; None draws them.
    logit: float | None = None

    def options(self) -> dict[str, Any]:
        rows = None
        if self.table == "published":
            rows = published_key_table(self.heads, self.kernel_size)
        elif self.table == "random":
            rows = random_key_table(self.heads, self.kernel_size)
        names = ("kernel_size", "dilation", "causal", "edge", "scale")
        return {**{name: getattr(self, name) for name in names}, "key_table": rows}

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """x and the weights."""
        x = torch.randn(self.batch, self.frames, self.positions, self.heads * self.head_dim)
        if self.sliced:
            x = torch.cat((x, x), -2)[:, :, : self.positions]
        shapes = Weights.shapes(self.heads, self.head_dim, self.frames, 2 * self.blocks)
        operands = [x]
        for name, shape in shapes.items():
            spread = shape[-2] ** -0.5 if name.endswith("weight") else 1
            operands.append(torch.randn(shape) * spread)
        if self.logit is not None:
            weight, bias = operands[1:3]
            weight[..., : 2 * self.head_dim] = 0
            bias[..., : self.head_dim] = 4
            bias[..., self.head_dim : 2 * self.head_dim] = self.logit / (4 * self.head_dim**0.5)
        return [t.to(dtype).to(device) for t in operands]

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{key}={value}" for key, value in changed.items()) or "default"


CASES = (
    Case(),
    Case(frames=4, heads=8, positions=3, batch=1),
    Case(frames=1, blocks=1),
    Case(frames=2, blocks=1, head_dim=16),
    Case(frames=3, kernel_size=9),
    Case(frames=5, head_dim=16, edge="shift", dilation=2, heads=3),
    Case(frames=7, head_dim=16, edge="zero", causal=True, heads=3, kernel_size=4),
    Case(batch=1, positions=70, frames=6, heads=1, head_dim=16, blocks=1),
    Case(sliced=True, blocks=0),
    Case(frames=27, head_dim=32, heads=1, positions=3, blocks=1, scale=-0.3),
    # Exponentials of these leave float32.
    Case(head_dim=16, blocks=1, logit=-120.0),
    Case(head_dim=16, blocks=1, logit=-120.0, edge="zero"),
    Case(head_dim=16, blocks=1, logit=120.0),
)
# Not for the Triton kernel.
MORE_CASES = (
    Case(frames=9, head_dim=20, heads=1),
    Case(frames=4, head_dim=3, heads=2, edge="zero"),
    Case(frames=70, head_dim=16, heads=1, positions=2, edge="shift", kernel_size=3, blocks=1),
    Case(heads=4, edge="zero", table="published", scale=1 / 64),
    Case(heads=3, frames=7, edge="zero", table="random", head_dim=32, sliced=True, positions=17),
    Case(heads=5, frames=2, edge="zero", table="published", head_dim=8, kernel_size=9),
    Case(frames=6, head_dim=48, heads=2, positions=20),
    Case(frames=8, head_dim=80, heads=1, positions=11),
)


def assert_close(found: Tensor, same: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of plain torch in the same dtype, plus two roundings."""
    assert found.isfinite().all()
    error, own = ((t.double().cpu() - exact).abs().max().item() for t in (found, same))
    limit = 2 * own + 2 * torch.finfo(found.dtype).eps * exact.abs().max().item()
    assert error <= limit, f"error {error:.3g}, allowed {limit:.3g}"


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """99.9 % of the elements are within a unit in the last place of the rounded exact result."""
    rounded = exact.to(found.dtype)
    unit = (torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded).double()
    near = (found.double() - rounded.double()).abs() <= unit
    assert near.double().mean() >= 0.999


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Holds a backend's output to the policy."""
    operands, options = case.tensors(dtype, device), case.options()
    found = temporal_block(*operands, **options, backend=backend).cpu()
    local = [t.cpu() for t in operands]
    same = temporal_block(*local, **options, backend="reference")
    exact = temporal_block(*(t.double() for t in local), **options, backend="reference")
    assert_close(found, same, exact)
    if backend == "cpu" and dtype in HALF:
        assert_rounded(found, exact)
