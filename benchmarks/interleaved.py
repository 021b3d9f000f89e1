"""Interleaved timing: the candidates run in turn, round after round, and medians are compared.

A shared or throttled machine slows all candidates of a round alike, so that ratios of medians hold
where times don't.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

#: Most rounds of any comparison: a few show that everything runs, and say little of its speed.
most_rounds = 1000


@dataclass(frozen=True)
class Timings:
    """Seconds that each candidate took, round by round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one candidate."""
        return median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times as long as `other` the candidate takes: median over median."""
        return self.median(name) / self.median(other)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 2,
    budget: float = 4.0,
    pause: float = 0.0,
) -> Timings:
    """Times the candidates in turn.

    Args:
        candidates: functions without arguments, by name.
        rounds: runs of each candidate at most.
        warmup: runs before the clock starts; slow candidates (by `budget`) get one.
        budget: seconds after which a candidate drops out of further rounds, once it has three.
        pause: seconds before each run. Threads of a pool spin for a while after their work; where
            candidates have pools of their own, they must have gone to sleep.

    Returns:
        The seconds of every run.
    """
    for run in candidates.values() if most_rounds > 1 else ():
        start = time.perf_counter()
        for _ in range(warmup):
            run()
            if time.perf_counter() - start > budget / 4:
                break
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(min(rounds, most_rounds)):
        for name, run in candidates.items():
            taken = seconds[name]
            if len(taken) >= 3 and sum(taken) > budget:
                continue
            if pause:
                time.sleep(pause)
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return Timings(seconds)
