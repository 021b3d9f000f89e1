"""The random numbers of stochastic rounding: Philox4x32-10, which needs no state but a counter.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011. A number depends on the seed, the step, the tensor and the element alone, so that it is the
same for every backend, number of threads and division of the work.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by from round to round
_ROUNDS = 10


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Four random words for each counter.

    Args:
        key: two words of 32 bits.
        counter: four words of 32 bits, as int64 tensors that broadcast.

    Returns:
        Four int64 tensors of 32 random bits each.

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(x)) for x in philox((0, 0), (zero, zero, zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    x = list(torch.broadcast_tensors(*counter))
    k = list(key)
    for _ in range(_ROUNDS):
        # Products of 64 bits wrap in int64, which keeps their bits.
        a, b = x[0] * _MULTIPLIERS[0], x[2] * _MULTIPLIERS[1]
        x = [
            ((b >> 32) & _WORD) ^ x[1] ^ k[0],
            b & _WORD,
            ((a >> 32) & _WORD) ^ x[3] ^ k[1],
            a & _WORD,
        ]
        k = [(word + step) & _WORD for word, step in zip(k, _WEYL, strict=True)]
    return x


class Draws(NamedTuple):
    """The random numbers of one tensor in one step.

    With s the seed, t the step, n the tensor and e the place of an element in the tensor's memory
    (its distance from the first element, in elements), the element has a share in word e mod 4 of

        Philox4x32-10(key (s mod 2^32, s div 2^32), counter (b mod 2^32, b div 2^32, n, t mod 2^32))

    where b = 4 (e div 32) + (e mod 16) div 4: elements i and i + 16 of 32 share a word. Each takes
    16 bits for theta, the first one the low ones and the second the high ones, and for the momentum
    the half that the other takes for theta. So the two numbers of an element are independent of
    each other, and theta's of those of all other elements.

    Attributes:
        seed: s, at least 0 and below 2^63.
        step: t, at least 0.
        tensor: n, at least 0 and below 2^32.

    Example:
        >>> draws = Draws(seed=0, step=0, tensor=0)
        >>> hex(draws.words(torch.zeros(2))[0].item())  # of theta and of the momentum: e8d5, 6627
        '0x6627e8d5'
    """

    seed: int
    step: int
    tensor: int

    def words(self, like: Tensor) -> Tensor:
        """Theta's and the momentum's 16 bits, low and high ones of an int64, for each element."""
        place = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
        for dim, (size, stride) in enumerate(zip(like.shape, like.stride(), strict=True)):
            along = torch.arange(size, dtype=torch.int64, device=like.device) * stride
            place += along.view(-1, *[1] * (like.dim() - dim - 1))
        block = (place >> 5) * 4 + (place % 16 >> 2)
        key = (self.seed & _WORD, self.seed >> 32)
        counter = (
            block & _WORD,
            block >> 32,
            torch.full_like(block, self.tensor),
            torch.full_like(block, self.step & _WORD),
        )
        shared = torch.stack(philox(key, counter), -1).gather(-1, (place % 4)[..., None])[..., 0]
        swapped = (shared & 0xFFFF) << 16 | shared >> 16
        return torch.where(place & 16 == 0, shared, swapped)
