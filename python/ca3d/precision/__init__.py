"""Precision regimes: which tensor is stored and computed in which dtype.

A regime is an object that the trainer asks for everything that depends on precision: it prepares
the model, makes the optimizer, and owns forward, backward and step.

Example:
    >>> create("bfloat16").name
    'bfloat16'
"""

from __future__ import annotations

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


def create(name: str) -> Regime:
    """Makes a precision regime.

    Args:
        name: One of `names()`.

    Returns:
        A new regime.

    Raises:
        ca3d.errors.UserError: The name is unknown.

    Example:
        >>> create("float32")
        Float32()
    """
    if name not in _REGIMES:
        raise UserError(f"precision {name!r} is not known; choose from {', '.join(_REGIMES)}")
    return _REGIMES[name]()


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
