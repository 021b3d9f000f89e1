"""Running a model over a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.precision import Regime
from ca3d.training.loader import ClipDataset, load_batches
from ca3d.training.metrics import Metrics


@dataclass
class Scores:
    """What a model made of a split.

    Args:
        metrics: The accuracy counts.
        loss: Mean cross-entropy of the averaged scores.
        probabilities: (videos, classes) float32.
        labels: (videos,) int64.
        indices: (videos,) int64, places in the data set.
        broken: Messages on the files that could not be read.

    Example:
        >>> none = torch.empty(0, dtype=torch.int64)
        >>> Scores(Metrics(2), 0.0, torch.empty(0, 2), none, none).summary()["videos"]
        0
    """

    metrics: Metrics
    loss: float
    probabilities: Tensor
    labels: Tensor
    indices: Tensor
    broken: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Returns the figures as plain values."""
        return {
            "top1": self.metrics.top1,
            "top5": self.metrics.top5,
            "mean_class": self.metrics.mean_class,
            "loss": self.loss,
            "videos": self.metrics.count,
            "unscored": int(self.metrics.unscored.sum()),
            "broken": list(self.broken),
        }


@torch.no_grad()
def score(
    model: nn.Module,
    regime: Regime,
    dataset: ClipDataset,
    num_classes: int,
    *,
    places: Sequence[int] | None = None,
    batch_size: int = 8,
    workers: int = 0,
    device: torch.device | None = None,
    average: str = "logits",
    after_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Classifies every video of a data set.

    Args:
        model: The model; put into evaluation mode.
        regime: The precision to compute in.
        dataset: Gives clips (3, T, H, W), or (views, 3, T, H, W) to be averaged over.
        num_classes: Number of classes.
        places: Which videos; None for all.
        batch_size: Videos in a batch.
        workers: Reading processes.
        device: Where to compute.
        average: Whether views are averaged as "logits" or as "softmax".
        after_batch: Called after every batch with the number of videos done.

    Returns:
        Figures and scores.

    Raises:
        ValueError: `average` is neither of the two.

    Example:
        >>> from ca3d import models
        >>> from ca3d.data.folder import VideoFolder
        >>> from ca3d.data.sampling import ClipSpec
        >>> from ca3d.precision import create
        >>> data = VideoFolder(
        ...     dataset_root, "val", clip=ClipSpec(size=32, resize=32), training=False
        ... )
        >>> model = models.create("ca3d_tiny", num_classes=2)
        >>> score(model, create("float32"), data, 2).metrics.count
        2
    """
    if average not in ("logits", "softmax"):
        raise ValueError(f"average must be 'logits' or 'softmax', not {average!r}")
    model.eval()
    places = list(range(len(dataset)) if places is None else places)
    batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
    metrics = Metrics(num_classes)
    broken: list[str] = []
    logs, labels, indices = [], [], []
    on_gpu = device is not None and device.type == "cuda"
    for batch in load_batches(dataset, batches, workers=workers, pin_memory=on_gpu):
        broken += batch.broken
        if len(batch):
            clips = batch.clips.to(device)
            views = clips.shape[1] if clips.dim() == 6 else 1
            logits = regime.forward(model, clips.reshape(-1, *clips.shape[-4:]))
            logits = logits.float().view(len(batch), views, -1)
            if average == "logits":
                log_probabilities = F.log_softmax(logits.mean(1), dim=1)
            else:
                log_probabilities = F.softmax(logits, dim=2).mean(1).log()
            metrics.update(log_probabilities, batch.labels)
            logs.append(log_probabilities.cpu())
            labels.append(batch.labels)
            indices.append(batch.indices)
        if after_batch is not None:
            after_batch(metrics.count)
    broken += getattr(dataset, "broken", {}).values()
    if not logs:
        empty = torch.empty(0, dtype=torch.int64)
        return Scores(
            metrics, float("nan"), torch.empty(0, num_classes), empty, empty.clone(), broken
        )
    log_probabilities, label = torch.cat(logs), torch.cat(labels)
    return Scores(
        metrics=metrics,
        loss=float(F.nll_loss(log_probabilities, label)),
        probabilities=log_probabilities.exp(),
        labels=label,
        indices=torch.cat(indices),
        broken=broken,
    )


def merge(parts: Sequence[Scores]) -> Scores:
    """Puts the scores of disjoint parts of a data set together, in the order of the data set.

    Args:
        parts: At least one; from `score` with different `places`.

    Example:
        >>> none = torch.empty(0, dtype=torch.int64)
        >>> part = Scores(Metrics(2), 0.5, torch.tensor([[0.9, 0.1]]), none, torch.tensor([7]))
        >>> merge([part]) is part
        True
    """
    if len(parts) == 1:
        return parts[0]
    metrics = Metrics(parts[0].metrics.num_classes)
    for part in parts:
        metrics.confusion += part.metrics.confusion
        metrics.unscored += part.metrics.unscored
        metrics.in_top5 += part.metrics.in_top5
    losses = [part.loss * part.metrics.count for part in parts if part.metrics.count]
    indices = torch.cat([part.indices for part in parts])
    order = indices.argsort()
    return Scores(
        metrics=metrics,
        loss=sum(losses) / metrics.count if losses else float("nan"),
        probabilities=torch.cat([part.probabilities for part in parts])[order],
        labels=torch.cat([part.labels for part in parts])[order],
        indices=indices[order],
        broken=[message for part in parts for message in part.broken],
    )
