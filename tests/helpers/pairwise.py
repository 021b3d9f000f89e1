"""Small sets of test cases that hold every pair of parameter values."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairwise_cases(
    parameters: Mapping[str, Sequence[Any]],
    allowed: Callable[[Case], bool] = lambda case: True,
    *,
    candidates: int = 20,
    seed: int = 0,
) -> list[Case]:
    """Cases such that every allowed pair of values of two parameters occurs in one of them.

    Greedy: each case starts from a pair that is still missing, and of several random completions
    the one with the most missing pairs is kept.

    Args:
        parameters: name -> values.
        allowed: whether a full case makes sense.
        candidates: completions that are tried for each case.
        seed: of the random completions.

    Returns:
        The cases. A pair that no completion made allowed is left out.
    """
    names = list(parameters)
    rng = random.Random(seed)

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in parameters[a]
        for y in parameters[b]
    }
    cases = []
    # Sorted, so that the set does not depend on the hashes of this process.
    for a, x, b, y in sorted(missing, key=repr):
        if (a, x, b, y) not in missing:
            continue
        best, most = None, 0
        for _ in range(candidates):
            case = {name: rng.choice(list(values)) for name, values in parameters.items()}
            case |= {a: x, b: y}
            if allowed(case) and (new := len(pairs(case) & missing)) > most:
                best, most = case, new
        missing.discard((a, x, b, y))
        if best is not None:
            missing -= pairs(best)
            cases.append(best)
    return cases
