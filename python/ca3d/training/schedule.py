"""Learning-rate schedules, as factors on the base rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

PUBLISHED_EPOCHS = 50
PUBLISHED_WARMUP = 10
PUBLISHED_MILESTONES = (25, 30, 35, 40, 45)


@dataclass(frozen=True)
class Schedule:
    """The factor on the learning rate at every optimizer step.

    It depends on the position alone, so that a resumed run needs no state of it.

    Args:
        name: "published", "cosine", "onecycle" or "constant".
        epochs: Length of the run in epochs.
        steps_per_epoch: Optimizer steps in an epoch.
        warmup_epochs: Epochs of warm-up; None is a fifth of the run (none for "constant").
        milestones: Epochs at which "published" halves the rate; None is 25, 30, .., 45 of 50,
            in proportion.
        total_steps: Optimizer steps after which the run stops, if before its last epoch; "cosine"
            and "onecycle" then end there.

    Raises:
        ValueError: An unknown name, or a length below 1.

    Example:
        >>> Schedule("published", epochs=50, steps_per_epoch=100).factor(12, 0)
        10.0
    """

    name: str
    epochs: int
    steps_per_epoch: int
    warmup_epochs: float | None = None
    milestones: Sequence[int] | None = None
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ("published", "cosine", "onecycle", "constant"):
            raise ValueError(
                f"schedule must be published, cosine, onecycle or constant, not {self.name!r}"
            )
        if self.epochs < 1 or self.steps_per_epoch < 1:
            raise ValueError(
                "epochs and steps_per_epoch must be at least 1, not "
                f"{self.epochs} and {self.steps_per_epoch}"
            )

    def factor(self, epoch: int, step: int) -> float:
        """Returns the factor on the base rate.

        Args:
            epoch: The epoch, from 0.
            step: The optimizer step within the epoch, from 0.

        Returns:
            The published recipe goes by epochs e: 1 + 9 e / E_w during the E_w epochs of warm-up,
            then 10, halved at every milestone <= e. "cosine" climbs linearly to 1 and falls along
            a half cosine to 0; "onecycle" climbs along a half cosine from 1/25 to 1 and falls
            along another to 1e-4; both go by steps.

        Example:
            >>> Schedule("constant", epochs=1, steps_per_epoch=1).factor(0, 0)
            1.0
        """
        if self.name == "constant" and not self.warmup_epochs:
            return 1.0
        if self.name == "published":
            return self._published(epoch)
        total = self.total_steps or self.epochs * self.steps_per_epoch
        done = epoch * self.steps_per_epoch + step
        warm = (
            total / 5 if self.warmup_epochs is None else self.warmup_epochs * self.steps_per_epoch
        )
        if done < warm:
            climbed = (done + 1) / warm if warm >= 1 else 1.0
            if self.name == "onecycle":
                return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * min(climbed, 1.0))) / 2
            return min(climbed, 1.0)
        if self.name == "constant":
            return 1.0
        fallen = (done - warm) / max(total - warm, 1)
        lowest = 1e-4 if self.name == "onecycle" else 0.0
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * min(fallen, 1.0))) / 2

    def _published(self, epoch: int) -> float:
        warmup = self.warmup_epochs
        if warmup is None:
            warmup = PUBLISHED_WARMUP * self.epochs // PUBLISHED_EPOCHS
        milestones = self.milestones
        if milestones is None:
            # Rounded up, so that the shortest run trains an epoch at the full rate.
            milestones = [-(-m * self.epochs // PUBLISHED_EPOCHS) for m in PUBLISHED_MILESTONES]
        climb = 1 + 9 * epoch / warmup if epoch < warmup else 10.0
        return climb * 0.5 ** bisect_right(list(milestones), epoch)
