"""Precision regimes: which tensor is stored and computed in which dtype.

A regime is an object that the trainer asks for everything that depends on precision: it prepares
the model, makes the optimizer, and owns forward, backward and step.

Example:
    >>> create("bfloat16").name
    'bfloat16'
"""

from __future__ import annotations

from typing import Any

from ca3d.errors import UserError
from ca3d.precision.float16 import (
    QAT,
    Float16,
    Float16Published,
    Float16Root,
    Float16Sqr,
    RawFloat16,
)
from ca3d.precision.memory import return_freed_memory
from ca3d.precision.regime import Bfloat16, Float32, Regime, Step
from ca3d.precision.simulated import FakeQuant, PtqFloat16

__all__ = [
    "QAT",
    "Bfloat16",
    "FakeQuant",
    "Float16",
    "Float16Published",
    "Float16Root",
    "Float16Sqr",
    "Float32",
    "PtqFloat16",
    "RawFloat16",
    "Regime",
    "Step",
    "create",
    "for_inference",
    "names",
    "return_freed_memory",
]

_REGIMES: dict[str, type[Regime]] = {
    regime.name: regime
    for regime in (
        Float32,
        Bfloat16,
        Float16,
        RawFloat16,
        Float16Published,
        Float16Sqr,
        Float16Root,
        QAT,
        FakeQuant,
        PtqFloat16,
    )
}


def names() -> list[str]:
    """Returns the names that `create` knows.

    Example:
        >>> names()[:3]
        ['float32', 'bfloat16', 'float16']
    """
    return list(_REGIMES)


def create(name: str, **options: Any) -> Regime:
    """Makes a precision regime.

    Args:
        name: One of `names()`.
        **options: Of the float16 regimes: `constant`, `loss_factor` and `rounding`, see `Float16`.

    Returns:
        A new regime.

    Raises:
        ca3d.errors.UserError: The name is unknown, or an option is not allowed.

    Example:
        >>> create("float32")
        Float32()
        >>> create("float16", rounding="stochastic").rounding
        'stochastic'
    """
    if name not in _REGIMES:
        raise UserError(f"precision {name!r} is not known; choose from {', '.join(_REGIMES)}")
    regime = _REGIMES[name]
    if options and not issubclass(regime, Float16):
        raise UserError(f"precision {name} has no options, got {', '.join(options)}")
    unknown = sorted(set(options) - {"constant", "loss_factor", "rounding"})
    if unknown:
        raise UserError(
            f"precision {name} has no option {unknown[0]!r}; it has constant, loss_factor, rounding"
        )
    try:
        return regime(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"precision {name}: {error}") from error


def for_inference(name: str) -> Regime:
    """Makes the regime in which a trained or converted model is used.

    Args:
        name: What the weights file says: a regime, or "float64" of tensors that are stored so and
            computed in float32.

    Returns:
        A new regime; its `prepare` brings the model to the dtypes that it computes in.

    Raises:
        ca3d.errors.UserError: The name is unknown.

    Example:
        >>> for_inference("ptq-float16")
        Float16()
    """
    if name == "float64":
        return Float32()
    regime = create(name)
    return Float16() if isinstance(regime, Float16 | PtqFloat16) else regime
