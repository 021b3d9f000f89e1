"""Clips of data sets for exported models: to set the ranges of int8, and to compare accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ca3d import weights
from ca3d.data import samples
from ca3d.data.folder import VideoFolder
from ca3d.errors import UserError
from ca3d.predict import check_complete, clip_spec
from ca3d.training.loader import load_batches

__all__ = ["Accuracy", "accuracy", "calibration_clips"]


def calibration_clips(
    info: weights.ModelInfo, data: str, count: int, decoder: str = "auto"
) -> list[Tensor]:
    """Central clips of training videos, evenly over the list.

    Args:
        info: of the model.
        data: the data set; without a train split all its videos count.
        count: how many at most.
        decoder: see `ca3d.data.reader.open_video`.

    Returns:
        Clips (3, T, H, W), normalised.

    Raises:
        ca3d.errors.UserError: the data set has no videos that can be read, or other classes.
    """
    split = "train" if "train" in samples.splits_of(data) else None
    dataset = _folder(info, data, split, decoder)
    count = min(count, len(dataset))
    places = [i * len(dataset) // count for i in range(count)]
    found = [clip for batch in load_batches(dataset, [[p] for p in places]) for clip in batch.clips]
    if not found:
        raise UserError(f"{data}: none of its {len(places)} training videos could be read")
    return found


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of two models on the same clips.

    Attributes:
        clips: number of clips.
        reference, exported: shares of clips that are right.
        agreement: share of clips to which both give the same class.
        difference: `exported` less `reference`.
        margin: half the width of the difference's 95 % interval, from the clips on which only one
            of the two is right.

    Example:
        >>> Accuracy.of(torch.tensor([1, 0, 1, 2]), torch.tensor([1, 1, 1, 2]),
        ...     torch.tensor([1, 1, 1, 0])).difference
        0.25
    """

    clips: int
    reference: float
    exported: float
    agreement: float
    difference: float
    margin: float

    @classmethod
    def of(cls, reference: Tensor, exported: Tensor, labels: Tensor) -> Accuracy:
        """Compares predicted classes.

        Args:
            reference, exported, labels: class numbers, (clips,).
        """
        count = len(labels)
        ours, theirs = exported == labels, reference == labels
        won, lost = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
        variance = won + lost - (won - lost) ** 2 / count
        return cls(
            clips=count,
            reference=int(theirs.sum()) / count,
            exported=int(ours.sum()) / count,
            agreement=int((reference == exported).sum()) / count,
            difference=(won - lost) / count,
            margin=1.96 * math.sqrt(max(variance, 0.0)) / count,
        )

    def __str__(self) -> str:
        return (
            f"top-1 on {self.clips} paired clips: model {100 * self.reference:.2f} %, exported "
            f"{100 * self.exported:.2f} %, difference {100 * self.difference:+.2f} +- "
            f"{100 * self.margin:.2f} points, same class {100 * self.agreement:.2f} %"
        )


@torch.no_grad()
def accuracy(
    reference: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    info: weights.ModelInfo,
    data: str,
    *,
    split: str = "test",
    clips: int = 2000,
    decoder: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Compares two models on the clips of a split.

    Args:
        reference, exported: map clips (B, 3, T, H, W) to logits.
        info: of the model.
        data: the data set.
        split: "train", "val", "test" or "all".
        clips: at least so many; each video gives as many, evenly over its length, as that takes.
        decoder: see `ca3d.data.reader.open_video`.
        progress: called with the videos done and their number.

    Returns:
        The accuracies and their difference.

    Raises:
        ca3d.errors.UserError: the data set has no such split, other classes, or can't be read.
    """
    chosen = None if split == "all" else split
    videos = len(_folder(info, data, chosen, decoder))
    views = math.ceil(clips / max(videos, 1))
    dataset = _folder(info, data, chosen, decoder, clips=views)
    found: dict[str, list[Tensor]] = {"reference": [], "exported": [], "labels": []}
    for number, batch in enumerate(load_batches(dataset, [[i] for i in range(videos)])):
        if len(batch):
            part = batch.clips.reshape(-1, *batch.clips.shape[-4:])
            found["reference"].append(reference(part).argmax(1))
            found["exported"].append(exported(part).argmax(1))
            found["labels"].append(batch.labels.repeat_interleave(len(part)))
        progress(number + 1, videos)
    if not found["labels"]:
        raise UserError(f"{data}: none of its {videos} videos could be read")
    return Accuracy.of(*(torch.cat(found[name]) for name in found))


def _folder(
    info: weights.ModelInfo, data: str, split: str | None, decoder: str, clips: int = 1
) -> VideoFolder:
    check_complete(info)
    dataset = VideoFolder(
        data,
        split,
        clip=clip_spec(info),
        training=False,
        clips=clips,
        mean=info.mean,
        std=info.std,
        decoder=decoder,
        classes=list(info.classes),
        color=info.color,
    )
    if not len(dataset):
        raise UserError(f"{data}: no videos in split {split or 'all'!r}")
    return dataset
