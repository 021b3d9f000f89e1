"""`interpreted.py`, with the Triton kernels in Triton's interpreter."""

import pytest
from interpreter_process import needs_triton, run_interpreted

pytestmark = [*needs_triton, pytest.mark.long]


def test_parity() -> None:
    assert run_interpreted("preparam_step/interpreted.py") > 30


@pytest.mark.slow
@pytest.mark.exhaustive
def test_parity_in_every_dtype() -> None:
    assert run_interpreted("preparam_step/interpreted.py", "-m", "exhaustive") > 15
