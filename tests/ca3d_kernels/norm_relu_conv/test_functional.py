"""Bad input of the public functions."""

from typing import Any

import pytest
import torch

from ca3d_kernels import norm_relu, norm_relu_conv


def arguments(**changes: Any) -> dict[str, Any]:
    """Good arguments of `norm_relu_conv`, of which some are replaced."""
    good = {
        "y": torch.randn(2, 4, 6, 5),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "conv_weight": torch.randn(6, 2, 3, 3),
        "conv_bias": torch.zeros(6),
        "residual": torch.randn(2, 4, 6, 5),
        "groups": 2,
    }
    return {**good, **changes}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
    ({"y": torch.zeros(2, 4, 6)}, ValueError, r"y must have shape \(N, C, H, W\).*got \(2, 4, 6\)"),
    ({"y": torch.zeros(0, 4, 6, 5)}, ValueError, "not be empty"),
    ({"y": torch.zeros(2, 4, 6, 5).int()}, TypeError, "y must have one of the dtypes float32"),
    ({"y": torch.zeros(2, 4, 6, 5).to_sparse()}, ValueError, "y must be a strided tensor"),
    ({"y": torch.zeros(1, 4, 1, 1), "residual": None}, ValueError, "more than 1 value per channel"),
    ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(4,\), got \(5,\)"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"bias": torch.ones(4).long()}, TypeError, "bias must have one of the dtypes"),
    ({"bias": torch.ones(4, device="meta")}, ValueError, "bias must be on y's device cpu"),
    ({"residual": torch.zeros(2, 4, 6, 6)}, ValueError, r"residual must have shape \(2, 4, 6, 5\)"),
    ({"residual": torch.zeros(2, 4, 6, 5).half()}, TypeError, "residual must have y's dtype"),
    ({"conv_weight": torch.ones(6, 2, 3)}, ValueError, r"conv_weight must have shape \(K, 2, h, w"),
    ({"conv_weight": torch.ones(6, 4, 3, 3)}, ValueError, "conv_weight must have shape"),
    ({"conv_weight": torch.ones(5, 2, 3, 3)}, ValueError, "K a multiple of groups=2"),
    ({"conv_weight": torch.ones(6, 2, 7, 3)}, ValueError, "must not be larger than y"),
    (
        {"conv_weight": torch.ones(6, 2, 3, 3).double()},
        TypeError,
        "conv_weight must have y's dtype",
    ),
    ({"conv_weight": 3}, TypeError, "conv_weight must be a tensor"),
    ({"conv_bias": torch.ones(4)}, ValueError, r"conv_bias must have shape \(6,\)"),
    ({"groups": 3}, ValueError, "groups must divide the 4 channels of y, got 3"),
    ({"groups": 0}, ValueError, "groups must divide"),
    ({"groups": 2.0}, TypeError, "groups must be an integer, got 2.0"),
    ({"stride": 0}, ValueError, "stride must be one integer or two, at least 1, got 0"),
    ({"stride": (1, 2, 3)}, ValueError, "stride must be one integer or two"),
    ({"stride": True}, ValueError, "stride must be one integer or two"),
    ({"padding": -1}, ValueError, "padding must be one integer or two, at least 0, got -1"),
    ({"padding": "same"}, TypeError, "padding must be one integer or two, got 'same'"),
    ({"eps": -1e-5}, ValueError, "eps must be finite and at least 0, got -1e-05"),
    ({"eps": float("nan")}, ValueError, "eps must be finite"),
    ({"eps": "small"}, TypeError, "eps must be a float, got 'small'"),
    ({"relu": 1}, TypeError, "relu must be a bool, got 1"),
    ({"return_z": None}, TypeError, "return_z must be a bool, got None"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ({"backend": "triton"}, ValueError, "backend='triton' can't run norm_relu_conv on cpu"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda x: str(x)[:60])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        norm_relu_conv(**arguments(**changes))


def test_good_input() -> None:
    assert norm_relu_conv(**arguments()).output.shape == (2, 6, 4, 3)
    assert norm_relu_conv(**arguments(padding=(0, 1), stride=[2, 1])).output.shape == (2, 6, 2, 5)


def test_bad_input_without_a_convolution() -> None:
    y, one = torch.randn(2, 4, 6, 5), torch.ones(4)
    with pytest.raises(ValueError, match="residual must have shape"):
        norm_relu(y, one, one, y[:1])
    with pytest.raises(TypeError, match="relu must be a bool"):
        norm_relu(y, one, one, relu=None)  # type: ignore[arg-type]
