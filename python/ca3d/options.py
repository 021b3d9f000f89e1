"""Dataclass fields that double as command-line options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def option(
    default: Any,
    help: str,
    group: str = "Options",
    *,
    positional: bool = False,
    count: int | str | None = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """Declares a dataclass field that the command line shows as an option.

    Args:
        default: The field's default value.
        help: One sentence for `--help`.
        group: The heading of `--help` under which the option stands.
        positional: Whether it is given without a flag.
        count: How many values follow the flag, as in argparse: a number, "+", or None for one.
        factory: Makes the default value where it is mutable; `default` is then ignored.

    Returns:
        A `dataclasses.field`.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     size: int = option(112, "Pixels")
        >>> Options().size, dataclasses.fields(Options)[0].metadata["help"]
        (112, 'Pixels')
    """
    metadata = {"help": help, "group": group, "positional": positional, "count": count}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
