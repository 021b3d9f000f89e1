"""Mistakes put into the Triton kernels on purpose, in Triton's interpreter."""

import pytest
from interpreter_process import needs_triton, run_interpreted

pytestmark = [*needs_triton, pytest.mark.long]


def test_mistakes_are_noticed() -> None:
    assert run_interpreted("triton_mutants.py") > 37
