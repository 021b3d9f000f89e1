"""Accuracy figures from logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Metrics:
    """Counts from which top-1, top-5 and mean class accuracy follow.

    A sample whose scores are NaN or infinite has no likeliest class, and counts as wrong.

    Args:
        num_classes: Number of classes.

    Raises:
        ValueError: Fewer than one class.

    Example:
        >>> metrics = Metrics(3)
        >>> metrics.update(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 1]))
        >>> metrics.top1, metrics.count
        (0.5, 2)
    """

    num_classes: int
    confusion: Tensor = field(init=False)
    unscored: Tensor = field(init=False)  # samples of each class without a likeliest one
    in_top5: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {self.num_classes}")
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        self.unscored = torch.zeros(self.num_classes, dtype=torch.int64)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            scores: (batch, classes), any floating dtype; larger is likelier.
            labels: (batch,), int64.
        """
        scores, labels = scores.detach().cpu(), labels.detach().cpu()
        # A class may have the probability 0, whose logarithm is -inf.
        scored = (scores < torch.inf).all(1)
        self.unscored += torch.bincount(labels[~scored], minlength=self.num_classes)
        scores, labels = scores[scored], labels[scored]
        predicted = scores.argmax(1)
        at = labels * self.num_classes + predicted
        self.confusion += torch.bincount(at, minlength=self.num_classes**2).view_as(self.confusion)
        top = scores.topk(min(5, self.num_classes), dim=1).indices
        self.in_top5 += int((top == labels[:, None]).any(1).sum())

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.confusion.sum() + self.unscored.sum())

    @property
    def top1(self) -> float:
        """Share of samples whose likeliest class is right; NaN without samples."""
        return float(self.confusion.diagonal().sum()) / self.count if self.count else float("nan")

    @property
    def top5(self) -> float:
        """Share of samples whose class is among the five likeliest; NaN without samples."""
        return self.in_top5 / self.count if self.count else float("nan")

    @property
    def per_class(self) -> Tensor:
        """(classes,) float64: accuracy over the samples of each class; NaN for an absent one."""
        totals = (self.confusion.sum(1) + self.unscored).double()
        return self.confusion.diagonal().double() / torch.where(totals > 0, totals, torch.nan)

    @property
    def mean_class(self) -> float:
        """Mean of `per_class` over the classes that have samples."""
        return float(self.per_class.nanmean())
