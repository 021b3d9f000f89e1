"""Fixtures of every test: poisoned memory and a fixed seed."""

import signal
from collections.abc import Iterator

import pytest
import torch

from ca3d_kernels.triton_launch import interpreted

# A shell that runs the tests in the background has them ignore SIGINT, which commands under test
# would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if interpreted():
    import triton_interpreter

    triton_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long tests first, so that the processes of a parallel run end together."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty() -> Iterator[None]:
    """Fills fresh memory (`torch.empty` and friends) with NaN, so that an element that a kernel
    forgot to write shows up as a failure instead of a lucky zero."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
