"""How far a model's probabilities can be trusted: temperature and thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ca3d.errors import UserError

DEFAULT_THRESHOLD = 0.5
#: The lowest and the highest temperature that `fit` tries.
TEMPERATURES = (0.05, 20.0)
_KEY = "calibration"
_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """What turns a model's logits into probabilities, and these into decisions.

    Attributes:
        temperature: The logits are divided by it.
        thresholds: For each class, the probability from which it counts as seen.
        measured_on: The split that it was measured on; empty when it was not.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> Calibration(2.0, (0.5, 0.5)).probabilities(torch.tensor([2.0, 0.0])).tolist()
        [0.7310585975646973, 0.2689414322376251]
    """

    temperature: float
    thresholds: tuple[float, ...]
    measured_on: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive, got {self.temperature!r}")
        object.__setattr__(self, "thresholds", tuple(map(float, self.thresholds)))
        if not all(0 <= value <= 1 for value in self.thresholds):
            raise ValueError(f"thresholds must lie in [0, 1], got {self.thresholds!r}")

    @classmethod
    def default(cls, classes: int) -> Calibration:
        """Of a model that was not calibrated."""
        return cls(1.0, (DEFAULT_THRESHOLD,) * classes)

    @classmethod
    def of_extra(cls, extra: dict[str, Any], classes: int) -> Calibration:
        """What a weights file holds in `ModelInfo.extra`, or the default.

        Args:
            extra: The dictionary.
            classes: Number of classes.

        Raises:
            ca3d.errors.UserError: It is damaged.

        Example:
            >>> Calibration.of_extra({}, 2).measured_on
            ''
        """
        stored = extra.get(_KEY)
        if stored is None:
            return cls.default(classes)
        try:
            calibration = cls(**stored)
        except (TypeError, ValueError) as error:
            raise UserError(f"the weights' calibration is damaged: {error}") from error
        if len(calibration.thresholds) != classes:
            raise UserError(
                f"the weights' calibration is of {len(calibration.thresholds)} classes, the model"
                f" has {classes}"
            )
        return calibration

    def to_extra(self) -> dict[str, Any]:
        """Returns what to add to `ModelInfo.extra`."""
        return {
            _KEY: {
                "temperature": self.temperature,
                "thresholds": list(self.thresholds),
                "measured_on": self.measured_on,
            }
        }

    def probabilities(self, logits: Tensor) -> Tensor:
        """Maps logits (..., classes) to probabilities of the same shape."""
        return F.softmax(logits / self.temperature, dim=-1)


def fit(logits: Tensor, labels: Tensor, measured_on: str = "") -> Calibration:
    """Chooses temperature and thresholds on data that the model was not trained on.

    The temperature is that of the least cross-entropy (Guo et al., On Calibration of Modern Neural
    Networks, 2017) within `TEMPERATURES`. A class's threshold is the one with the best F1 of
    telling its clips from all others, the middle among equally good ones; but at least 1/2: what is
    less likely than all the rest together is not reported.

    Args:
        logits: (samples, classes).
        labels: (samples,) int64.
        measured_on: Name of the data.

    Raises:
        ValueError: Not a single sample, or shapes that do not fit.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> fit(logits, torch.tensor([0, 0, 1, 1])).temperature > 1  # sure of itself, often wrong
        True
    """
    if logits.dim() != 2 or len(logits) == 0 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (samples, classes) and labels (samples,), got {tuple(logits.shape)}"
            f" and {tuple(labels.shape)}"
        )
    logits = logits.double()
    temperature = _best_temperature(logits, labels)
    probabilities = F.softmax(logits / temperature, dim=1)
    thresholds = tuple(
        _best_threshold(probabilities[:, place], labels == place)
        for place in range(logits.shape[1])
    )
    return Calibration(temperature, thresholds, measured_on)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = _BINS) -> float:
    """Expected calibration error: how far confidence and accuracy are apart, in the mean.

    Samples are put into `bins` equal intervals by the probability of their likeliest class; the
    result is the mean of |accuracy - mean probability| of the bins, weighted by their samples.

    Args:
        probabilities: (samples, classes).
        labels: (samples,) int64.
        bins: Number of intervals.

    Returns:
        In [0, 1]; NaN without samples.

    Example:
        >>> probabilities = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
        >>> calibration_error(probabilities, torch.tensor([0, 0, 0, 1]))
        0.0
    """
    if not len(labels):
        return math.nan
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    places = (confidence * bins).long().clamp(max=bins - 1)
    off = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, right - confidence)
    return float(off.abs().sum() / len(labels))


def _best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Minimises over log T by golden section: the loss is convex in 1 / T, so it has one dip."""

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    low, high = map(math.log, TEMPERATURES)
    ratio = (math.sqrt(5) - 1) / 2
    inner, outer = high - ratio * (high - low), low + ratio * (high - low)
    at_inner, at_outer = loss(inner), loss(outer)
    while high - low > 1e-5:
        if at_inner <= at_outer:
            high, outer, at_outer = outer, inner, at_inner
            inner = high - ratio * (high - low)
            at_inner = loss(inner)
        else:
            low, inner, at_inner = inner, outer, at_outer
            outer = low + ratio * (high - low)
            at_outer = loss(outer)
    return math.exp((low + high) / 2)


def _best_threshold(scores: Tensor, positive: Tensor) -> float:
    if not bool(positive.any()):
        return DEFAULT_THRESHOLD
    order = scores.argsort(descending=True)
    scores, hits = scores[order], positive[order].double()
    found = hits.cumsum(0)
    taken = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    f1 = 2 * found / (taken + hits.sum())
    # A cut is possible only between different scores.
    possible = torch.ones(len(scores), dtype=torch.bool)
    possible[:-1] = scores[:-1] > scores[1:]
    best = int(torch.where(possible, f1, -1.0).argmax())
    upper = float(scores[best])
    lower = float(scores[best + 1]) if best + 1 < len(scores) else 0.0
    return max((upper + lower) / 2, DEFAULT_THRESHOLD)
