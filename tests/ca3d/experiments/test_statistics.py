"""The statistics against closed forms and sums done by hand."""

import math

import numpy as np
import pytest

from ca3d.experiments.statistics import (
    Interval,
    binomial_interval,
    bootstrap_interval,
    holm,
    paired_difference,
    paired_t_p,
)

# Two-sided 5 % points of Student's t, from any printed table.
T_TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814}


def _differences_of(t: float, count: int) -> np.ndarray:
    """Numbers whose paired t statistic is t."""
    spread = np.linspace(-1, 1, count)
    return spread + t * spread.std(ddof=1) / math.sqrt(count)


@pytest.mark.parametrize("freedom", sorted(T_TABLE))
def test_t_test_has_the_printed_points(freedom: int) -> None:
    differences = _differences_of(T_TABLE[freedom], freedom + 1)
    assert paired_t_p(differences) == pytest.approx(0.05, abs=2e-6)
    assert paired_t_p(-differences) == paired_t_p(differences)


def test_t_test_of_two_and_three_numbers_by_its_closed_form() -> None:
    # One degree of freedom is Cauchy's distribution; two have 1 - t / sqrt(2 + t^2).
    assert paired_t_p([0.0, 2.0]) == pytest.approx(1 - 2 / math.pi * math.atan(1.0))
    t = 2 * math.sqrt(3)
    assert paired_t_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_t_test_without_spread() -> None:
    assert paired_t_p([0.0, 0.0, 0.0]) == 1.0
    assert paired_t_p([0.1, 0.1, 0.1]) == 0.0
    with pytest.raises(ValueError, match="at least 2"):
        paired_t_p([0.1])


def test_binomial_interval_by_hand() -> None:
    interval = binomial_interval(80, 100)
    half = 1.959964 * math.sqrt(0.8 * 0.2 / 100)
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.8 - half, abs=1e-7)
    assert interval.high == pytest.approx(0.8 + half, abs=1e-7)
    assert binomial_interval(10, 10) == Interval(1.0, 1.0, 1.0)
    assert binomial_interval(1, 10).low == 0.0
    with pytest.raises(ValueError, match="from 0 to 10"):
        binomial_interval(11, 10)


def test_bootstrap_of_equal_seeds_is_the_bootstrap_over_groups() -> None:
    # Equal seeds leave the clips as the only source of chance: a binomial mean, whose spread is
    # known.
    row = [1.0] * 60 + [0.0] * 40
    interval = bootstrap_interval([row] * 5, draws=20000)
    expected = math.sqrt(0.6 * 0.4 / 100)
    assert interval.mean == pytest.approx(0.6)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * expected, rel=0.05)


def test_bootstrap_of_one_group_is_the_bootstrap_over_seeds() -> None:
    # One group leaves the seeds: means of 5 draws from five numbers.
    table = [[x] * 4 for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    interval = bootstrap_interval(table, ["one"] * 4, draws=20000)
    means = np.sort(
        [
            np.mean(draw)
            for draw in np.stack(np.meshgrid(*[[0, 0.25, 0.5, 0.75, 1]] * 5), -1).reshape(-1, 5)
        ]
    )
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=0.051)
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=0.051)


def test_groups_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    by_group = np.repeat(rng.random(10) < 0.5, 10).astype(float)
    groups = np.repeat(np.arange(10), 10).tolist()
    apart = bootstrap_interval([by_group] * 5)
    together = bootstrap_interval([by_group] * 5, groups)
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert together.mean == apart.mean


def test_groups_of_unequal_size_count_by_clips() -> None:
    scores = [[1.0, 1.0, 1.0, 0.0]] * 5
    interval = bootstrap_interval(scores, ["a", "a", "a", "b"], draws=5000)
    # Draws of two groups: aa 1, ab 3/4, bb 0; each quarter is more than 2.5 %.
    assert (interval.low, interval.mean, interval.high) == (0.0, 0.75, 1.0)


def test_fewer_than_five_seeds_is_no_inference() -> None:
    interval = bootstrap_interval([[1.0, 0.0]] * 4)
    assert not interval.inferred
    assert "no inference" in interval.as_percent()
    first = {s: [1.0, 0.0] for s in range(4)}
    interval, p = paired_difference(first, first)
    assert not interval.inferred
    assert math.isnan(p)


def test_differences_are_paired_by_seed() -> None:
    # The seeds differ much, the conditions by exactly one clip under each seed.
    first = {s: [1.0] * (s + 1) + [0.0] * (9 - s) for s in range(5)}
    second = {s: [1.0] * s + [0.0] * (10 - s) for s in reversed(range(7))}
    interval, p = paired_difference(first, second)
    assert interval.mean == pytest.approx(0.1)
    assert p == 0.0
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: [1.0]}, {1: [1.0]})
    with pytest.raises(ValueError, match="different numbers of clips"):
        paired_difference({0: [1.0]}, {0: [1.0, 0.0]})


def test_holm_by_hand() -> None:
    found = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005, "e": math.nan})
    # 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 raised to what went before.
    assert found["d"] == pytest.approx(0.02)
    assert found["b"] == pytest.approx(0.03)
    assert found["c"] == pytest.approx(0.06)
    assert found["a"] == pytest.approx(0.06)
    assert math.isnan(found["e"])
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_intervals_cover_what_they_should() -> None:
    # 200 experiments of 5 seeds and 100 clips at a true accuracy of 0.7.
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        interval = bootstrap_interval((rng.random((5, 100)) < 0.7).astype(float), draws=400)
        covered += interval.low <= 0.7 <= interval.high
    assert covered >= 188
