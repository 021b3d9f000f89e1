"""The parity suite once more, with the Triton kernels in Triton's interpreter."""

import pytest
from interpreter_process import needs_triton, run_interpreted

pytestmark = [*needs_triton, pytest.mark.long]


def test_parity() -> None:
    # The property test runs in float64, which these kernels refuse.
    chosen = "not any_shape and not every_pair and not bfloat16 and not wider"
    assert run_interpreted("local_attention/test_parity.py", "-k", chosen) > 50


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_pair_of_options() -> None:
    chosen = "every_pair or bfloat16 or wider"
    assert run_interpreted("local_attention/test_parity.py", "-k", chosen) > 90
