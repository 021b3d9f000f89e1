import math

import pytest
import torch

from ca3d.training.metrics import Metrics


def test_figures_by_hand() -> None:
    metrics = Metrics(3)
    scores = torch.tensor(
        [[3.0, 1, 0], [0, 3, 1], [5, 2, 1], [0.1, 0.2, 0.3], [9, 8, 7], [0, 0, 4]]
    )
    labels = torch.tensor([0, 1, 1, 2, 0, 2])
    metrics.update(scores[:4], labels[:4])
    metrics.update(scores[4:], labels[4:])
    assert metrics.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 2]]
    assert metrics.count == 6
    assert metrics.top1 == 5 / 6
    assert metrics.top5 == 1.0
    assert metrics.per_class.tolist() == [1.0, 0.5, 1.0]
    assert metrics.mean_class == pytest.approx(2.5 / 3)


def test_top5_counts_the_five_largest() -> None:
    metrics = Metrics(8)
    scores = torch.arange(8.0).repeat(8, 1)
    metrics.update(scores, torch.arange(8))
    assert metrics.top5 == 5 / 8
    assert metrics.top1 == 1 / 8


def test_mean_class_leaves_absent_classes_out() -> None:
    metrics = Metrics(3)
    metrics.update(torch.tensor([[1.0, 0, 0], [1, 0, 0]]), torch.tensor([0, 1]))
    assert math.isnan(metrics.per_class[2])
    assert metrics.mean_class == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_never_right(bad: float) -> None:
    metrics = Metrics(2)
    scores = torch.tensor([[bad, 0.0], [0.0, bad], [1.0, 0.0], [-math.inf, 0.0]])
    metrics.update(scores, torch.tensor([0, 1, 0, 1]))
    assert metrics.unscored.tolist() == [1, 1]
    assert metrics.count == 4
    assert metrics.top1 == metrics.top5 == metrics.mean_class == 0.5
    assert metrics.confusion.tolist() == [[1, 0], [0, 1]]


def test_no_samples_give_nan() -> None:
    metrics = Metrics(2)
    assert math.isnan(metrics.top1)
    assert math.isnan(metrics.top5)


def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        Metrics(0)
