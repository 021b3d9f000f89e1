"""Precision regimes: which tensor is stored and computed in which dtype.

A regime is an object that the trainer asks for everything that depends on precision: it prepares
the model, makes the optimizer, and owns forward, backward and step.

Example:
    >>> create("bfloat16").name
    'bfloat16'
"""

from __future__ import annotations

from ca3d.errors import UserError
from ca3d.precision.regime import Bfloat16, Float32, Regime, Step

__all__ = ["Bfloat16", "Float32", "Regime", "Step", "create", "for_inference", "names"]

_REGIMES: dict[str, type[Regime]] = {"float32": Float32, "bfloat16": Bfloat16}


def names() -> list[str]:
    """Returns the names that `create` knows.

    Example:
        >>> names()
        ['float32', 'bfloat16']
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
        name: What the weights file says; "float16" and "float64" tell how its tensors are stored,
            and are computed in float32.

    Returns:
        A new regime; its `prepare` brings the model to the dtypes that it computes in.

    Raises:
        ca3d.errors.UserError: The name is unknown.

    Example:
        >>> for_inference("float16")
        Float32()
    """
    return create("float32" if name in ("float16", "float64") else name)
