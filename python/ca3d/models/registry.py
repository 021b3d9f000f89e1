"""Models by name: what the command line, the weights files and the trainer build models with."""

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["create", "names", "register"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator that makes a model buildable by name.

    The decorated function takes `num_classes` and keyword options, and returns a module that maps
    (B, 3, T, H, W) to (B, num_classes) and whose final linear layer is its attribute `classifier`.

    Args:
        name: the name, as users type it.

    Returns:
        The decorator; it returns the function unchanged.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @register("example")
        ... def example(num_classes: int, width: int = 4) -> nn.Module:
        ...     model = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
        ...     model.classifier = model[-1]
        ...     return model
        >>> create("example", num_classes=2).options
        {'num_classes': 2}
        >>> del _builders["example"]
    """

    def decorate(builder: Builder) -> Builder:
        if name in _builders:
            raise ValueError(f"a model named {name!r} is already registered")
        _builders[name] = builder
        return builder

    return decorate


def names() -> list[str]:
    """Names of all models that `create` builds, sorted.

    Example:
        >>> "ca3d" in names()
        True
    """
    return sorted(_builders)


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Builds a model by name.

    Args:
        name: one of `names()`.
        num_classes: number of classes, at least 1.
        **options: the model's own options.

    Returns:
        A module that maps normalised clips (B, 3, T, H, W) to logits (B, num_classes). Its `name`
        and `options` rebuild it: ``create(model.name, **model.options)``; `classifier` is its final
        linear layer.

    Raises:
        ValueError: unknown name, or a number of classes below 1.
        TypeError: an option that the model doesn't have.

    Example:
        >>> create("ca3d_tiny", num_classes=5).classifier.out_features
        5
    """
    if name not in _builders:
        close = difflib.get_close_matches(name, _builders, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {name!r}{hint} Known: {', '.join(names())}")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be an integer of at least 1, got {num_classes!r}")
    model = _builders[name](num_classes=num_classes, **options)
    for attribute, value in (("name", name), ("options", {"num_classes": num_classes, **options})):
        if not hasattr(model, attribute):
            setattr(model, attribute, value)
    return model
