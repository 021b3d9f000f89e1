"""The folded convolution as a function and as an op of torch."""

from typing import Any

import pytest
import torch

from ca3d_kernels import folded_conv


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 16, 5, 6),
        "weight": torch.randn(32, 16, 3, 3),
        "bias": torch.randn(32),
        "shift": torch.randn(32),
        "padding": (1, 1),
        **changes,
    }


def test_opcheck() -> None:
    given = arguments()
    rest = (None, None, None, (1, 1), (1, 1), 1, "")
    torch.library.opcheck(
        torch.ops.ca3d.folded_conv,
        (given["x"], given["weight"], given["bias"], given["shift"], *rest),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compile() -> None:
    given = arguments()
    torch._dynamo.reset()
    compiled = torch.compile(folded_conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), folded_conv(**given))


def test_no_images() -> None:
    assert folded_conv(**arguments(x=torch.randn(0, 16, 5, 6))).shape == (0, 32, 5, 6)


def test_float64_takes_the_definition() -> None:
    given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    found = folded_conv(**given)
    assert torch.equal(found, folded_conv(**given, backend="reference"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": "x"}, TypeError, "x must be a tensor, got str"),
        ({"x": torch.ones(2, 16, 5, 6, dtype=int)}, TypeError, "x must have one of the dtypes"),
        ({"x": torch.ones(2, 16, 5)}, ValueError, r"x must have shape \(N, C, H, W\)"),
        ({"groups": 3}, ValueError, "groups must divide the 16 channels of x, got 3"),
        ({"groups": True}, TypeError, "groups must be an integer, got True"),
        ({"stride": (0, 1)}, ValueError, "stride must be two integers of at least 1"),
        ({"padding": 1}, ValueError, "padding must be two integers of at least 0, got 1"),
        ({"weight": torch.ones(32, 8, 3, 3)}, ValueError, r"weight must have shape \(K, 16, h, w"),
        ({"weight": torch.ones(32, 16, 9, 3)}, ValueError, "weight must not be larger than x"),
        ({"bias": torch.ones(32).half()}, TypeError, "bias must have x's dtype"),
        ({"shift": torch.ones(16)}, ValueError, r"shift must have shape \(32,\), got \(16,\)"),
        ({"scale": [1.0]}, TypeError, "scale must be a tensor, got list"),
        ({"residual": torch.ones(2, 32, 5, 5)}, ValueError, r"residual must have shape \(2, 32,"),
        ({"residual_scale": torch.ones(32)}, ValueError, "residual_scale needs a residual"),
        ({"bias": torch.ones(32, device="meta")}, ValueError, "bias must be on x's device cpu"),
        ({"backend": "triton"}, ValueError, "triton has no kernel for folded_conv"),
        ({"x": torch.ones(2, 16, 5, 6).requires_grad_()}, RuntimeError, "has no derivatives"),
    ],
)
def test_bad_input(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        folded_conv(**arguments(**changes))
