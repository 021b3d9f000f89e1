"""The Triton kernel against its definition; runs in Triton's interpreter.

Not collected by itself: `test_interpreted.py` runs it in a process of its own.
"""

import pytest
import torch
from block_cases import CASES, HALF, Case, check

from ca3d_kernels import UnsupportedInputError, temporal_block, use_backend


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    with use_backend("triton", fallback=False):
        check(case, dtype, "triton")


def test_infinities_stay_in_their_position() -> None:
    case = Case(frames=4, positions=9, batch=1)
    operands = case.tensors(torch.float16)
    clean = temporal_block(*operands, backend="triton")
    operands[0][0, 1, 4, 3] = torch.inf
    output = temporal_block(*operands, backend="triton")
    others = [n for n in range(9) if n != 4]
    assert torch.equal(output[:, :, others], clean[:, :, others])
    assert not output[0, 1, 4, : case.head_dim].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frames": 33}, "33 frames are more than the 32 that a tile holds"),
        ({"head_dim": 128}, "head_dim 128 is not 16, 32 or 64"),
        ({"edge": "zero", "table": "published"}, "a key table mixes heads"),
    ],
)
def test_refusals(changes: dict, reason: str) -> None:
    case = Case(**changes)
    operands, options = case.tensors(torch.float16), case.options()
    with (
        use_backend("triton", fallback=False),
        pytest.raises(UnsupportedInputError, match=reason),
    ):
        temporal_block(*operands, **options, backend="triton")
    with pytest.warns(RuntimeWarning, match=reason):
        temporal_block(*operands, **options, backend="triton")
