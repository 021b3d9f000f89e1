"""One thread for everything but the kernels under test: tiny torch operations gain nothing from
more, and wait long for them on a busy machine."""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
from attention_cases import threads
from cuda_emulation import build_module, registered


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module `_cuda`, built once for the host and all processes of the run."""
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return build_module(folder / "cuda-emulation")


@pytest.fixture
def emulated_cuda(emulated_library: ModuleType) -> Iterator[ModuleType]:
    """Backend "cuda" takes CPU tensors here, and runs the CUDA sources on the host."""
    with registered(emulated_library):
        yield emulated_library
