"""One thread for everything but the kernels under test: tiny torch operations gain nothing from
more, and wait long for them on a busy machine."""

from collections.abc import Iterator

import pytest
from attention_cases import threads


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
