"""Every window of up to nine frames, on every kernel."""

import itertools

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    PARAMETERS,
    Problem,
    assert_rounded,
    backends_here,
    compare,
    errors,
)

KERNELS = [backend for backend in backends_here() if backend.values[0] != "reference"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", range(1, 10))
def test_full_sweep_of_windows(kernel_size: int, dtype: torch.dtype, backend: str) -> None:
    """The policy for a whole sweep: the worst error against the worst error of plain torch.

    Of some thousand problems, each of a few elements, plain torch is lucky in some.
    """
    rest = itertools.cycle(
        itertools.product(((8, 1), (16, 3), (64, 4), (20, 8)), LAYOUTS, LAYOUTS, (False, True))
    )
    worst: dict[str, tuple[float, Problem]] = {}
    torch_worst: dict[str, float] = {}
    for frames, dilation, causal, edge in itertools.product(
        (*range(1, 11), 16, 17, 33, 64), (1, 2, 3), (False, True), PARAMETERS["edge"]
    ):
        (head_dim, heads), layout, grad_layout, packed = next(rest)
        problem = Problem(
            frames=frames, kernel_size=kernel_size, dilation=dilation, causal=causal, edge=edge,
            heads=heads, head_dim=head_dim, dtype=dtype, layout=layout, grad_layout=grad_layout,
            packed=packed, lead=(2,),
        )  # fmt: skip
        for name, ours, same_dtype, exact in compare(problem, backend):
            error, torch_error, largest = errors(ours, same_dtype, exact)
            if largest == 0:
                assert error == 0, f"{problem}: {name}"
                continue
            worst[name] = max(
                worst.get(name, (0, problem)), (error / largest, problem), key=lambda pair: pair[0]
            )
            torch_worst[name] = max(torch_worst.get(name, 0), torch_error / largest)
            if dtype in (torch.float16, torch.bfloat16):
                assert_rounded(f"{problem}: {name}", ours, exact)
    for name, (error, problem) in worst.items():
        limit = 2 * torch_worst[name] + 2 * torch.finfo(dtype).eps
        assert error <= limit, f"{problem}: {name}: error {error:.3g}, allowed {limit:.3g}"
