"""Choice of the backend that runs an op: cuda, triton, cpu (compiled C++) or reference (torch).

A backend is named by an argument, by `use_backend`, or by the environment variable
``CA3D_BACKEND``, in this order of precedence. Otherwise the fastest one that can run is taken.
The reference backend runs everything everywhere. Nothing is loaded before an op needs it.
"""

import contextlib
import contextvars
import functools
import importlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

NAMES = ("cuda", "triton", "cpu", "reference")
_VARIABLE = "CA3D_BACKEND"

# What a device type tries, best first.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

Result = TypeVar("Result")


class UnsupportedInputError(NotImplementedError):
    """A kernel's refusal of an input, raised before it has written anything.

    The message names the limit, such as "head_dim 512 is above 256". Unless ``fallback=False`` was
    asked for, the next backend takes over with one warning.
    """


@dataclass(frozen=True)
class Implementation:
    """One backend's kernels of one op.

    Attributes:
        backend: name of the backend.
        load: returns the kernels; called at the first use, so that it may import what it needs.
        unavailable: why they can't run on tensors of a device type, or None when they can.
    """

    backend: str
    load: Callable[[], Any]
    unavailable: Callable[[str], str | None]


_implementations: dict[str, dict[str, Implementation]] = {}
_context: contextvars.ContextVar[tuple[str, bool]] = contextvars.ContextVar(
    "ca3d_backend", default=("", True)
)


def register(op: str, implementation: Implementation) -> None:
    """Adds one backend's kernels of an op.

    Args:
        op: name of the op without its namespace, such as ``"local_attention"``.
        implementation: the kernels; a second registration of the same backend replaces the first.

    Raises:
        ValueError: the backend's name is not one of `NAMES`.
    """
    check_name(implementation.backend)
    _implementations.setdefault(op, {})[implementation.backend] = implementation


def ops() -> tuple[str, ...]:
    """Names of all ops that have a registered implementation."""
    return tuple(_implementations)


def check_name(name: str, argument: str = "backend") -> str:
    """Checks a backend's name and returns it, ``""`` for None and for ``"auto"``.

    Raises:
        ValueError: not the name of a backend.

    Example:
        >>> check_name("cpu"), check_name("auto")
        ('cpu', '')
    """
    if name is None or name == "auto":
        return ""
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {('auto', *NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str, *, fallback: bool = True) -> Iterator[None]:
    """Runs every op inside the ``with`` block, and its later backward pass, on the named backend.

    A ``backend=`` argument takes precedence over it. The choice is per thread.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``, or ``"auto"``.
        fallback: whether an input that the backend's kernel can't take goes to the next backend
            (with one warning) instead of raising `UnsupportedInputError`.

    Raises:
        ValueError: not the name of a backend. An op raises it as well when the backend can't run
            on its tensors' device.

    Example:
        >>> import torch
        >>> from ca3d_kernels import local_temporal_attention
        >>> q = torch.randn(2, 4, 8, 16)                  # batch, heads, T, head_dim
        >>> with use_backend("reference"):
        ...     out = local_temporal_attention(q, q, q)
    """
    token = _context.set((check_name(name, "name"), fallback))
    try:
        yield
    finally:
        _context.reset(token)


def requested(backend: str | None = None) -> str:
    """The backend that an argument or else `use_backend` demands; ``""`` if neither does.

    Raises:
        ValueError: not the name of a backend.

    Example:
        >>> with use_backend("cpu"):
        ...     requested(), requested("reference")
        ('cpu', 'reference')
    """
    return check_name(backend) if backend else _context.get()[0]


def from_environment() -> str:
    """The backend that ``CA3D_BACKEND`` names; ``""`` if it names none.

    Raises:
        ValueError: not the name of a backend.

    Example:
        >>> os.environ[_VARIABLE] = "reference"
        >>> from_environment()
        'reference'
        >>> del os.environ[_VARIABLE]
    """
    return check_name(os.environ.get(_VARIABLE) or "auto", _VARIABLE)


def explain(op: str, device: str) -> dict[str, str | None]:
    """Why each backend that could serve an op on a device type can't, or None when it can.

    Args:
        op: name of the op.
        device: device type, ``"cpu"`` or ``"cuda"``.

    Returns:
        Backend -> reason or None, in the order of preference. Backends that never serve the
        device are left out.

    Example:
        >>> explain("local_attention", "cpu")["reference"] is None
        True
    """
    return {name: _obstacle(op, name, device) for name in _PREFERENCE[device]}


def choose(op: str, device: str, backend: str = "") -> list[Implementation]:
    """Implementations to try in turn for an op on a device type.

    Args:
        op: name of the op.
        device: device type of the tensors, ``"cpu"`` or ``"cuda"``.
        backend: result of `requested`. ``""`` leaves the choice to `from_environment` (which is
            ignored on devices that the backend doesn't serve) and then to what is available.
            A backend that has no kernel of this op leaves it to the next, unless
            ``fallback=False`` was asked for.

    Returns:
        The chosen implementation first, then those to fall back to.

    Raises:
        ValueError: the demanded backend can't run the op on this device (the message says why),
            no backend serves it, or ``CA3D_BACKEND`` isn't the name of a backend.
    """
    if device not in _PREFERENCE:
        raise ValueError(f"{op} can't run on {device} tensors, only on {', '.join(_PREFERENCE)}")
    order = _PREFERENCE[device]
    source = "backend"
    if not backend:
        source = _VARIABLE
        backend = from_environment()
        if backend and backend not in order and _obstacle(op, backend, device):
            backend = ""
    if backend in order and backend not in _implementations[op] and _may_fall_back():
        order = order[order.index(backend) + 1 :]
        backend = ""
    if backend:
        if obstacle := _obstacle(op, backend, device):
            usable = [name for name in order if _obstacle(op, name, device) is None]
            raise ValueError(
                f"{source}={backend!r} can't run {op} on {device} tensors: {obstacle}; "
                f"allowed here: {', '.join(('auto', *usable))}"
            )
        # Behind the demanded backend only slower ones are worth trying.
        rank = order.index(backend) + 1 if backend in order else 0
        order = (backend, *order[rank:])
    else:
        order = tuple(name for name in order if _obstacle(op, name, device) is None)
    implementations = _implementations[op]
    return [implementations[name] for name in order if name in implementations]


def run(op: str, device: str, backend: str, call: Callable[[Any], Result]) -> Result:
    """Calls a function with the kernels of the chosen backend, or of the next that takes the input.

    Args:
        op, device, backend: as in `choose`.
        call: receives what the implementation's ``load`` returned.

    Raises:
        UnsupportedInputError: the kernel refused the input and falling back was ruled out.
        ValueError: see `choose`.
    """
    implementations = choose(op, device, backend)
    for implementation, following in itertools.pairwise(implementations):
        try:
            return call(implementation.load())
        except UnsupportedInputError as limit:
            if not _may_fall_back():
                raise
            _warn_fallback(op, implementation.backend, following.backend, str(limit))
    return call(implementations[-1].load())


def native() -> ModuleType | None:
    """The compiled module `ca3d_kernels._native`, loaded at the first call; None when missing.

    A missing library gives one warning with the remedy, or with ``CA3D_REQUIRE_NATIVE=1`` an error.

    Raises:
        ImportError: ``CA3D_REQUIRE_NATIVE=1`` and the library can't be loaded.
    """
    module, error = _load_native()
    if module is None:
        if os.environ.get("CA3D_REQUIRE_NATIVE") == "1":
            raise ImportError(f"CA3D_REQUIRE_NATIVE=1, but {error}")
        _warn_missing_native()
    return module


def native_error() -> str | None:
    """Why the compiled library can't be loaded and what helps, or None when it is loaded."""
    return _load_native()[1]


def native_lacks(*functions: str) -> str | None:
    """Why the compiled library can't provide the named functions, or None when it can."""
    module = native()
    if module is None:
        return "the compiled library is missing"
    missing = [name for name in functions if not hasattr(module, name)]
    if missing:
        return f"the compiled library is of another version (it has no {missing[0]}): build it anew"
    return None


def _may_fall_back() -> bool:
    return _context.get()[1]


def _obstacle(op: str, backend: str, device: str) -> str | None:
    implementation = _implementations.get(op, {}).get(backend)
    if implementation is None:
        return f"{backend} has no kernel for {op}"
    return implementation.unavailable(device)


@functools.cache
def _load_native() -> tuple[ModuleType | None, str | None]:
    # torch first: its OpenMP runtime is then the one that the library shares.
    importlib.import_module("torch")
    try:
        return importlib.import_module("ca3d_kernels._native"), None
    except ImportError as error:
        return None, f"the compiled library of ca3d_kernels can't be loaded ({error}). {_remedy()}"


def _remedy() -> str:
    """What the user can do about a missing compiled library."""
    root = Path(__file__).resolve().parent.parent
    for entry in sys.path:
        folder = Path(entry or ".").resolve()
        if folder != root and any(folder.glob("ca3d_kernels/_native*")):
            return (
                f"The source tree {root} hides the installed package in {folder}: "
                "start Python in another folder, or run `pip install -e .` in the source tree."
            )
    where = f"`pip install -e .` in {root}" if (root / "setup.py").exists() else "it"
    return f"Install a C++17 compiler (Debian, Ubuntu: `apt install g++`), then reinstall {where}."


@functools.cache
def _warn_missing_native() -> None:
    warnings.warn(
        f"{native_error()} Until then the CPU runs the slow reference backend.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_fallback(op: str, backend: str, following: str, limit: str) -> None:
    warnings.warn(
        f"the {backend} kernel of {op} can't take this input ({limit}); using {following}",
        RuntimeWarning,
        stacklevel=2,
    )
