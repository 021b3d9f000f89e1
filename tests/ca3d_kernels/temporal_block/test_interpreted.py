"""`interpreted.py`, with the Triton kernels in Triton's interpreter."""

from interpreter_process import needs_triton, run_interpreted

pytestmark = needs_triton


def test_parity() -> None:
    assert run_interpreted("temporal_block/interpreted.py") > 20
