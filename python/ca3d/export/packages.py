"""The packages of the extras: importing them with a clear error, and keeping them quiet."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from ca3d.errors import UserError

__all__ = ["import_extra", "quiet"]


def import_extra(name: str, extra: str) -> Any:
    """Imports a module of a package that only an extra installs.

    Args:
        name: the module.
        extra: the extra of this package.

    Returns:
        The module.

    Raises:
        ca3d.errors.UserError: it is not installed; says what installs it.

    Example:
        >>> import_extra("no_such_package.part", "onnx")
        Traceback (most recent call last):
        ca3d.errors.UserError: no_such_package is needed and not installed; run: \
pip install "ca3d-kernels[onnx]"
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is needed and not installed; run: "
            f'pip install "ca3d-kernels[{extra}]"'
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what exporters and quantizers say of their own progress.

    Example:
        >>> with quiet():
        ...     print("tracing ...")
    """
    level = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
