"""Stochastic rounding of float32 values to float16 and bfloat16, given the random bits."""

import torch
from torch import Tensor


def round_stochastically(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Rounds to one of the two neighbours, up with a probability proportional to the distance.

    Between neighbours a < |x| < b the result is b in magnitude with probability
    (|x| - a) / (b - a), exactly: the bits that float32 has beyond the dtype (13 or 16) are compared
    with as many random ones. Two exceptions:

    - Below 2^-14 in float16, |x| is first rounded to a multiple of 2^-37, which is 2^-13 of the
      distance of its neighbours.
    - Beyond the largest finite number there is no upper neighbour: values are rounded to nearest
      there, to infinity from half an ulp beyond it. Nothing else becomes infinite. Infinities and
      NaN stay what they are.

    Args:
        x: float32, any shape.
        dtype: float16 or bfloat16.
        random: integers from 0 to 65535 as int64, in the shape of x; uniform ones make the mean of
            the result x. 65535 rounds away from zero, 0 towards it. The result grows with it.

    Returns:
        x in dtype.

    Example:
        >>> x = torch.full((2,), 1 + 2**-12)  # a quarter of the way from 1 to the next float16
        >>> round_stochastically(x, torch.float16, torch.tensor([49151, 49152])).tolist()
        [1.0, 1.0009765625]
    """
    # As int64, because int32 has no unsigned comparison.
    magnitude = x.abs().contiguous().view(torch.int32).to(torch.int64)
    if dtype == torch.float16:
        # Adding 2^-14 puts the last bit of a subnormal result where that of a normal one is.
        lifted = (x.abs() + 2**-14).contiguous().view(torch.int32).to(torch.int64)
        subnormal = magnitude < 113 << 23
        bits = torch.where(subnormal, lifted, magnitude) + (random >> 3) >> 13
        bits -= torch.where(subnormal, 113 << 10, 112 << 10)
        largest, nearest_from = 0x7BFF, 0x477FF000  # 65504, 65520
    else:
        bits = magnitude + random >> 16
        largest, nearest_from = 0x7F7F, 0x7F7F8000
    bits = bits.clamp(max=largest) | (x.signbit().to(torch.int64) << 15)
    rounded = bits.to(torch.int16).view(dtype)
    return torch.where(magnitude < nearest_from, rounded, x.to(dtype))
