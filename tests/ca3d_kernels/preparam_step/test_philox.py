"""The random numbers of stochastic rounding: those of the published generator, and independent."""

import pytest
import torch
from torch import Tensor

from ca3d_kernels.preparam_step.philox import Draws, philox

# Key, counter and result from the known answers of Random123, the authors' own library.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def word(x: int) -> Tensor:
    return torch.tensor([x])


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_known_answers(
    key: tuple[int, int], counter: tuple[int, int, int, int], expected: tuple[int, ...]
) -> None:
    a, b, c, d = counter
    assert [x.item() for x in philox(key, (word(a), word(b), word(c), word(d)))] == list(expected)


def test_words_are_those_of_the_counter() -> None:
    draws = Draws(seed=0x299F31D0_A4093822, step=2**32 + 7, tensor=3)
    words = draws.words(torch.zeros(100)).tolist()
    for place in (0, 3, 5, 15, 16, 31, 32, 77, 99):
        block = 4 * (place // 32) + place % 16 // 4
        shared = philox((0xA4093822, 0x299F31D0), (word(block), word(0), word(3), word(7)))
        expected = int(shared[place % 4])
        if place % 32 >= 16:
            expected = expected % 2**16 * 2**16 + expected // 2**16
        assert words[place] == expected


def test_words_belong_to_places_in_memory() -> None:
    draws = Draws(seed=5, step=1, tensor=2)
    flat = draws.words(torch.zeros(60))
    assert torch.equal(draws.words(torch.zeros(3, 4, 5)), flat.view(3, 4, 5))
    assert torch.equal(draws.words(torch.zeros(5, 12).t()), flat.view(5, 12).t())
    assert draws.words(torch.zeros(())).item() == flat[0]
    assert draws.words(torch.zeros(0, 3)).shape == (0, 3)


def test_numbers_are_uniform_and_independent() -> None:
    like = torch.zeros(2**16)
    drawn = []
    for numbers in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (2**32, 0, 0)):
        words = Draws(*numbers).words(like)
        drawn += [words & 0xFFFF, words >> 16]
    uniform = torch.stack(drawn).double() / 2**16  # theta's and the momentum's
    expected = torch.eye(len(drawn), dtype=torch.float64)
    assert (uniform.mean(1) - 0.5).abs().max() < 5 * 12**-0.5 / 2**8
    assert (torch.corrcoef(uniform) - expected).abs().max() < 5 / 2**8
    for bit in range(16):
        ones = (torch.stack(drawn) >> bit & 1).double().mean(1)
        assert (ones - 0.5).abs().max() < 5 * 0.5 / 2**8
