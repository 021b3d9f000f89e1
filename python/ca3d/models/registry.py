"""Models by name: what the command line, the weights files and the trainer build models with."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import nn

from ca3d.errors import UserError

__all__ = ["create", "create_for_clips", "decay_groups", "names", "recipe", "register"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

INSTALL = 'pip install "ca3d-kernels[baselines]"'
_LIBRARIES = ("timm", "torchvision", "transformers")

_builders: dict[str, Callable[..., nn.Module]] = {}


@dataclass(frozen=True)
class Recipe:
    """Published training options that differ between models.

    Attributes:
        weight_decay: on UCF101 and HMDB51; the published runs on Kinetics all have 5e-5.
    """

    weight_decay: float = 5e-3


@dataclass(frozen=True)
class _Baseline:
    """Where a model's function of the same name is; the module is imported when it is built."""

    module: str
    recipe: Recipe = Recipe()


_LOW_DECAY = Recipe(weight_decay=5e-4)
_BASELINES = {
    "r3d_18": _Baseline("r3d"),
    "r3d_tiny": _Baseline("r3d"),
    "r2plus1d_18": _Baseline("r2plus1d"),
    "r2plus1d_18_15m": _Baseline("r2plus1d"),
    "r2plus1d_tiny": _Baseline("r2plus1d"),
    "i3d": _Baseline("i3d", _LOW_DECAY),
    "i3d_tiny": _Baseline("i3d", _LOW_DECAY),
    "x3d_m": _Baseline("x3d"),
    "x3d_l": _Baseline("x3d"),
    "x3d_xl": _Baseline("x3d"),
    "x3d_tiny": _Baseline("x3d"),
    "stam_b": _Baseline("stam", _LOW_DECAY),
    "stam_tiny": _Baseline("stam", _LOW_DECAY),
    "timesformer_b": _Baseline("timesformer", _LOW_DECAY),
    "timesformer_tiny": _Baseline("timesformer", _LOW_DECAY),
    "vivit_2": _Baseline("vivit", _LOW_DECAY),
    "vivit_tiny": _Baseline("vivit", _LOW_DECAY),
    "swin3d_t": _Baseline("swin3d", _LOW_DECAY),
    "swin3d_tiny": _Baseline("swin3d", _LOW_DECAY),
    "tubevit_b": _Baseline("tubevit", _LOW_DECAY),
    "tubevit_tiny": _Baseline("tubevit", _LOW_DECAY),
}


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
        {'num_classes': 2, 'width': 4}
        >>> del _builders["example"]
    """

    def decorate(builder: Builder) -> Builder:
        if name in _builders or name in _BASELINES:
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
    return sorted({*_builders, *_BASELINES})


def recipe(name: str) -> Recipe:
    """Published training options of a model; nothing is built or imported.

    Args:
        name: one of `names()`.

    Returns:
        The options.

    Raises:
        ValueError: unknown name.

    Example:
        >>> recipe("i3d").weight_decay
        0.0005
    """
    check_name(name)
    return _BASELINES[name].recipe if name in _BASELINES else Recipe()


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
        TypeError: an option that the model doesn't have, or of another type.
        ca3d.errors.UserError: a library that the model is made of is not installed.

    Example:
        >>> create("ca3d_tiny", num_classes=5).classifier.out_features
        5
    """
    builder = _builder(name)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be an integer of at least 1, got {num_classes!r}")
    _check_options(name, builder, options)
    model = builder(num_classes=num_classes, **options)
    if not hasattr(model, "options"):
        bound = inspect.signature(builder).bind(num_classes=num_classes, **options)
        bound.apply_defaults()
        model.options = {key: _plain(value) for key, value in bound.arguments.items()}  # type: ignore[assignment]
    if not hasattr(model, "name"):
        model.name = name  # type: ignore[assignment]
    return model


def _check_options(name: str, builder: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for an option that the builder itself would stumble over."""
    parameters = inspect.signature(builder, eval_str=True).parameters
    known = {key: p.annotation for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    if len(known) < len(parameters):
        from ca3d.models.options import CA3DOptions

        # A CA3D: these options check their values themselves.
        known |= {field.name: Any for field in fields(CA3DOptions)}
    for key, value in options.items():
        if key not in known:
            allowed = ", ".join(option for option in known if option != "num_classes")
            raise TypeError(f"{name} has no option {key!r}; it has {allowed}")
        kind = known[key]
        if kind == Sequence[int]:
            if not isinstance(value, (list, tuple)) or not all(_is(int, x) for x in value):
                raise TypeError(f"{key} must be a list of integers, got {value!r}")
        elif kind is int and not _is(int, value):
            raise TypeError(f"{key} must be an integer, got {value!r}")
        elif kind is float and not (_is((int, float), value) and math.isfinite(value)):
            raise TypeError(f"{key} must be a finite number, got {value!r}")


def _is(kind: type | tuple[type, ...], value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def create_for_clips(
    name: str, num_classes: int, *, frames: int, size: int, **options: Any
) -> nn.Module:
    """Builds a model by name for clips of one shape.

    Args:
        name: one of `names()`.
        num_classes: number of classes, at least 1.
        frames: frames of a clip.
        size: height and width of a clip; models that take any size don't have this option.
        **options: the model's own options.

    Returns:
        As `create`.

    Raises:
        ValueError, TypeError, ca3d.errors.UserError: as `create`.

    Example:
        >>> create_for_clips("ca3d_tiny", 5, frames=8, size=32).frames
        8
    """
    known = inspect.signature(_builder(name)).parameters
    shape = {"frames": frames, **({"size": size} if "size" in known else {})}
    return create(name, num_classes, **{**shape, **options})


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """A model's trainable parameters as an optimizer's groups: its `no_weight_decay` names apart.

    Args:
        model: any model; if it has a method `no_weight_decay`, that returns the names of parameters
            that the published recipe doesn't decay.

    Returns:
        One group, or a second one whose weight decay is 0.

    Example:
        >>> len(decay_groups(create("ca3d_tiny", 5)))
        1
    """
    apart = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for name, p in trained if name not in apart]}]
    kept = [p for name, p in trained if name in apart]
    return [*groups, {"params": kept, "weight_decay": 0.0}] if kept else groups


def check_name(name: str) -> None:
    """Checks that there is a model of a name.

    Raises:
        ValueError: there is none; the message lists all.

    Example:
        >>> check_name("ca3d")
    """
    if name not in _builders and name not in _BASELINES:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown model {name!r}{hint} Known: {', '.join(names())}")


def _builder(name: str) -> Callable[..., nn.Module]:
    check_name(name)
    if name in _builders:
        return _builders[name]
    try:
        module = importlib.import_module(f"ca3d.models.baselines.{_BASELINES[name].module}")
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if library not in _LIBRARIES:
            raise
        raise UserError(
            f"model {name!r} needs the package {library}, which is missing; run: {INSTALL}"
        ) from error
    builder: Callable[..., nn.Module] = getattr(module, name)
    return builder


def _plain(value: Any) -> Any:
    """The value as JSON brings it back."""
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
