"""Marks the cases of a large set that only `-m exhaustive` runs."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], chosen: Callable[..., bool]) -> list[Any]:
    """Cases for `parametrize`: the chosen ones in every full run, the others with -m exhaustive.

    Args:
        cases: tuples of parameters.
        chosen: takes the parameters of a case.
    """
    return [
        pytest.param(
            *case,
            marks=() if chosen(*case) else pytest.mark.exhaustive,
            id="-".join(map(str, case)),
        )
        for case in cases
    ]
