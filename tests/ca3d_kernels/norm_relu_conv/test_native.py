"""What the compiled library does on every instruction set, and with bad sizes."""

import pytest
import torch
from norm_cases import DTYPES, Problem, check

from ca3d_kernels import backends

native = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=str(backends.native_error()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 24, 40, 41), (2, 16, 5, 4)], ids=str)
def test_every_instruction_set(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    before = native.isa()
    try:
        for isa in native.isas():
            native.set_isa(isa)
            check(Problem(shape, dtype, residual=True), "cpu")
    finally:
        native.set_isa(before)


def test_the_library_refuses_bad_sizes() -> None:
    for rows, channels, threads, message in (
        (0, 4, 1, "rows must be at least 1, got 0"),
        (4, 0, 1, "channels must be at least 1, got 0"),
        (4, 4, 0, "threads must be at least 1, got 0"),
    ):
        matrix, none = (rows, channels), (0, 0)
        with pytest.raises(ValueError, match=message):
            native.normalise("float32", matrix, True, none, 0.0, 0, 0, none, 0, threads)
        with pytest.raises(ValueError, match=message):
            native.normalise_again("float32", matrix, True, none, 0.0, 0, none, 0, threads)
        with pytest.raises(ValueError, match=message):
            native.normalise_backward(
                "float32", matrix, True, none, 0.0, 0, none, 0, 0, 0, none, threads
            )
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        native.normalise("int8", (1, 1), True, (0, 0), 0.0, 0, 0, (0, 0), 0, 1)
