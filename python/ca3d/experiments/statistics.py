"""How sure a figure is: intervals, paired differences, and corrections for many of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = [
    "LEAST_SEEDS",
    "Interval",
    "binomial_interval",
    "bootstrap_interval",
    "holm",
    "paired_difference",
    "paired_t_p",
]

#: With fewer runs than this nothing is inferred: a report says "no inference".
LEAST_SEEDS = 5
NO_INFERENCE = "no inference"

Name = TypeVar("Name", bound=Hashable)

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval.

    Args:
        mean: The estimate.
        low: Lower end; NaN where nothing is inferred.
        high: Upper end; NaN where nothing is inferred.

    Example:
        >>> Interval(0.5, 0.25, 0.75).as_percent()
        '50.0 [25.0, 75.0]'
        >>> Interval(0.5, float("nan"), float("nan")).as_percent()
        '50.0 (no inference)'
    """

    mean: float
    low: float
    high: float

    @property
    def inferred(self) -> bool:
        """Whether there is an interval at all."""
        return not math.isnan(self.low)

    def as_percent(self, digits: int = 1, sign: bool = False) -> str:
        """Returns the estimate and the interval in percent, as the reports print them."""
        flag = "+" if sign else ""
        mean, low, high = (f"{100 * x:{flag}.{digits}f}" for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if self.inferred else f"{mean} ({NO_INFERENCE})"


def binomial_interval(correct: float, clips: int) -> Interval:
    """The normal approximation to the binomial interval over clips, as the paper prints it.

    It takes the clips for independent and the trained model for given: it says nothing about
    another seed, another person or another recording, and is too narrow when clips are cut from one
    video.

    Args:
        correct: Clips that were classified rightly; a mean over seeds may be a fraction.
        clips: Clips in all, at least 1.

    Returns:
        p and p ± 1.96 sqrt(p (1 - p) / clips), cut to [0, 1].

    Raises:
        ValueError: `clips` is below 1, or `correct` outside [0, clips].

    Example:
        >>> binomial_interval(50, 100).as_percent()
        '50.0 [40.2, 59.8]'
    """
    if clips < 1:
        raise ValueError(f"clips must be at least 1, got {clips}")
    if not 0 <= correct <= clips:
        raise ValueError(f"correct must be from 0 to {clips}, got {correct}")
    share = correct / clips
    half = _Z95 * math.sqrt(share * (1 - share) / clips)
    return Interval(share, max(share - half, 0.0), min(share + half, 1.0))


def bootstrap_interval(
    scores: Sequence[Sequence[float]] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over seeds and source groups.

    Each draw takes as many seeds as there are, and independently as many groups, with replacement
    (the pigeonhole bootstrap of two crossed factors), and averages the scores of the clips of the
    drawn groups under the drawn seeds. It errs on the wide side.

    Args:
        scores: (seeds, clips): 1 for a clip classified rightly, or the difference of two models.
        groups: (clips,) what recording or person a clip comes from; None takes each for itself.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        The mean over all seeds and clips, and the 2.5 % and 97.5 % quantiles of the draws; NaN for
        fewer than `LEAST_SEEDS` seeds.

    Raises:
        ValueError: The scores are not two-dimensional or empty, or `groups` has another length.

    Example:
        >>> bootstrap_interval([[1, 0, 1, 1]] * 5).mean
        0.75
        >>> bootstrap_interval([[1, 0, 1, 1]] * 4).inferred
        False
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"scores must have the shape (seeds, clips), got {table.shape}")
    seeds, clips = table.shape
    if groups is None:
        groups = range(clips)
    if len(groups) != clips:
        raise ValueError(f"groups must name all {clips} clips, got {len(groups)}")
    mean = float(table.mean())
    if seeds < LEAST_SEEDS:
        return Interval(mean, math.nan, math.nan)
    number: dict[Hashable, int] = {}
    member = np.array([number.setdefault(group, len(number)) for group in groups])
    count = len(number)
    # Sums per seed and group: a draw then costs a matrix product and no copy of the scores.
    sums = np.zeros((seeds, count))
    np.add.at(sums.T, member, table.T)
    sizes = np.bincount(member, minlength=count).astype(np.float64)
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    group_weights = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    totals = np.einsum("ds,sg,dg->d", seed_weights, sums, group_weights)
    means = totals / (seeds * (group_weights @ sizes))
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean, float(low), float(high))


def paired_difference(
    first: Mapping[int, Sequence[float]],
    second: Mapping[int, Sequence[float]],
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = 2000,
) -> tuple[Interval, float]:
    """The difference of two conditions on the same clips under the same seeds.

    Args:
        first: Seed -> (clips,) scores.
        second: The same of what is subtracted. Seeds that only one of them has are left out.
        groups: As in `bootstrap_interval`.
        draws: Bootstrap samples.

    Returns:
        The interval of first - second, and the p-value of `paired_t_p` over the seeds; NaN where
        fewer than `LEAST_SEEDS` seeds are paired.

    Raises:
        ValueError: No seed is paired, or the clips differ in number.

    Example:
        >>> ours, theirs = {s: [1, 1, 0, 1] for s in range(5)}, {s: [1, 0, 0, 1] for s in range(5)}
        >>> interval, p = paired_difference(ours, theirs)
        >>> interval.mean, p
        (0.25, 0.0)
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        raise ValueError("the two conditions have no seed in common")
    if len({len(scores[s]) for scores in (first, second) for s in seeds}) != 1:
        raise ValueError("the two conditions were tested on different numbers of clips")
    table = np.array([np.subtract(first[s], second[s], dtype=np.float64) for s in seeds])
    interval = bootstrap_interval(table, groups, draws=draws)
    if len(seeds) < LEAST_SEEDS:
        return interval, math.nan
    return interval, paired_t_p(table.mean(1))


def paired_t_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of Student's paired t-test: that the mean of the differences is 0.

    It takes the differences of the seeds for draws of one normal distribution. (An exact test of
    five seeds' signs could not fall below 0.06, whatever the seeds say.)

    Args:
        differences: n >= 2 numbers, one a seed.

    Returns:
        p; 1 if all differences are 0, and 0 if they are all the same and not 0.

    Raises:
        ValueError: Fewer than two differences.

    Example:
        >>> round(paired_t_p([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"differences must be at least 2 numbers, got the shape {values.shape}")
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if spread <= 1e-12 * max(abs(mean), 1e-300):
        return 1.0 if mean == 0 else 0.0
    return _t_tails(mean / spread * math.sqrt(len(values)), len(values) - 1)


def _t_tails(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t with whole degrees of freedom (Abramowitz, Stegun 26.7.3-4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return max(0.0, 1.0 - inside)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's step-down correction of many p-values.

    Args:
        p_values: p by name of the comparison; NaN (no inference) stays NaN and is not counted.

    Returns:
        Adjusted p-values by name: rejecting those up to 0.05 keeps the chance of any false
        rejection at 5 %, however the comparisons depend on each other.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    known = sorted((p, i, name) for i, (name, p) in enumerate(p_values.items()) if p == p)
    adjusted = dict.fromkeys(p_values, math.nan)
    highest = 0.0
    for rank, (p, _, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = highest
    return adjusted
