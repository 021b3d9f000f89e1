"""`interpreted.py`, with the Triton kernels in Triton's interpreter."""

import pytest
from interpreter_process import needs_triton, run_interpreted

pytestmark = [*needs_triton, pytest.mark.long]


def test_parity() -> None:
    assert run_interpreted("temporal_block/interpreted.py") > 20
