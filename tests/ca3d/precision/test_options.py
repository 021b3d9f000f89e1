"""Options of the float16 regimes: constant, loss factor, rounding."""

import pytest
import torch
from torch import nn

from ca3d import precision
from ca3d.cli import parse
from ca3d.errors import UserError
from ca3d_kernels import LinearMapping, PreParamSGD


def _optimizer(regime: precision.Regime, seed: int = 0) -> PreParamSGD:
    torch.manual_seed(seed)
    layer = regime.prepare(nn.Linear(2, 2))
    optimizer = regime.optimizer("sgd", layer.parameters(), lr=0.1)
    assert isinstance(optimizer, PreParamSGD)
    return optimizer


def test_options_reach_the_optimizer() -> None:
    regime = precision.create("float16", constant=100, loss_factor=0.5, rounding="compensated")
    group = _optimizer(regime).param_groups[0]
    assert group["mapping"] == LinearMapping(100, 0.5)
    assert group["rounding"] == "compensated"
    assert regime.loss_factor == 0.5  # type: ignore[attr-defined]
    # What is left out stays the regime's own, and other regimes of the kind are untouched.
    assert precision.create("float16", constant=100).mapping == LinearMapping(100, 128)  # type: ignore[attr-defined]
    assert precision.create("float16").mapping == LinearMapping(128, 128)  # type: ignore[attr-defined]


def test_stochastic_rounding_draws_by_the_seed_of_the_run() -> None:
    regime = precision.create("float16", rounding="stochastic")
    assert _optimizer(regime, 3).seed == 3
    assert _optimizer(regime, 4).seed == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("float32", {"rounding": "nearest"}, "precision float32 has no options, got rounding"),
        ("float16", {"scale": 1}, "has no option 'scale'"),
        ("float16", {"rounding": "up"}, "rounding must be one of nearest, .* not 'up'"),
        ("float16", {"constant": 0}, "must be positive and finite, got 0"),
        ("float16", {"constant": "big"}, "must be a number"),
        ("float16-root", {"constant": 2.0}, "precision float16-root has a map of its own"),
    ],
)
def test_bad_options_are_one_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        precision.create(name, **options)


def test_command_line_takes_them() -> None:
    line = "train videos --precision float16 --precision-options.rounding stochastic"
    _, config = parse([*line.split(), "--precision-options.constant", "100"])
    assert config.precision_options == {"rounding": "stochastic", "constant": 100}
