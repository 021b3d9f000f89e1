import math

import pytest

from ca3d.training.schedule import Schedule


def published(epoch: int, warmup: int, milestones: list[int]) -> float:
    """Learning-rate factor of the published recipe, by its words."""
    factor = 1 + 9 * epoch / warmup if epoch < warmup else 10
    for milestone in milestones:
        if epoch >= milestone:
            factor *= 0.5
    return factor


def test_published_recipe_of_50_epochs() -> None:
    schedule = Schedule("published", epochs=50, steps_per_epoch=7)
    factors = [schedule.factor(epoch, step=3) for epoch in range(50)]
    assert factors == [published(e, 10, [25, 30, 35, 40, 45]) for e in range(50)]
    assert factors[0] == 1.0
    assert factors[11] == factors[24] == 10.0
    assert factors[49] == 10 / 32


def test_published_recipe_of_kinetics() -> None:
    milestones = list(range(70, 120, 5))
    schedule = Schedule("published", 120, 7, warmup_epochs=20, milestones=milestones)
    assert [schedule.factor(e, 0) for e in range(120)] == [
        published(e, 20, milestones) for e in range(120)
    ]


def test_published_recipe_stretches_with_the_run() -> None:
    schedule = Schedule("published", epochs=100, steps_per_epoch=1)
    assert [schedule.factor(e, 0) for e in range(100)] == [
        published(e, 20, [50, 60, 70, 80, 90]) for e in range(100)
    ]
    assert Schedule("published", epochs=1, steps_per_epoch=1).factor(0, 0) == 10.0


def test_cosine_climbs_to_one_and_falls_to_zero() -> None:
    schedule = Schedule("cosine", epochs=10, steps_per_epoch=10)
    factors = [schedule.factor(i // 10, i % 10) for i in range(100)]
    assert factors[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    expected = [(1 + math.cos(math.pi * i / 80)) / 2 for i in range(80)]
    assert factors[20:] == pytest.approx(expected)


def test_onecycle_peaks_after_the_warmup() -> None:
    schedule = Schedule("onecycle", epochs=4, steps_per_epoch=25, warmup_epochs=1)
    factors = [schedule.factor(i // 25, i % 25) for i in range(100)]
    assert max(factors) == factors[24] == factors[25] == pytest.approx(1.0)
    assert factors[0] < 0.05
    assert factors[-1] == pytest.approx(1e-4, abs=1e-3)
    assert factors[:25] == sorted(factors[:25])
    assert factors[25:] == sorted(factors[25:], reverse=True)


def test_total_steps_end_the_cosine() -> None:
    schedule = Schedule("cosine", epochs=10, steps_per_epoch=10, total_steps=30)
    assert schedule.factor(2, 9) < 0.01


def test_constant_may_warm_up() -> None:
    assert Schedule("constant", 10, 10).factor(0, 0) == 1.0
    warm = Schedule("constant", 10, 10, warmup_epochs=1)
    assert warm.factor(0, 4) == 0.5
    assert warm.factor(5, 0) == 1.0


@pytest.mark.parametrize(
    ("name", "epochs", "steps"), [("linear", 1, 1), ("cosine", 0, 1), ("cosine", 1, 0)]
)
def test_bad_arguments_are_named(name: str, epochs: int, steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Schedule(name, epochs, steps)
