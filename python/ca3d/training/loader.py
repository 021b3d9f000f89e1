"""Batches in an order that depends on seed and epoch alone, so that a run can resume anywhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ca3d.data.samples import Sample
from ca3d.data.workers import start_worker
from ca3d.errors import UserError


class ClipDataset(Protocol):
    """What the trainer needs of a data set: `ca3d.data.folder.VideoFolder` is one."""

    classes: list[str]
    samples: list[Sample]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | None:
        """Returns clip (3, frames, height, width) or (views, 3, ...), label, index; None when the
        video can't be read."""

    def set_epoch(self, epoch: int) -> None:
        """Makes later random draws those of `epoch`."""

    @property
    def unreadable(self) -> Tensor:
        """Which clips turned out to be unreadable so far: (clips,) bool."""

    @property
    def broken(self) -> dict[Path, str]:
        """The files of these clips, with the reason."""


@dataclass
class Batch:
    """A batch as it leaves the loader.

    Args:
        clips: (batch, 3, frames, height, width) float32, or (batch, views, 3, ...) in testing.
        labels: (batch,) int64.
        indices: (batch,) int64, places in the data set.
        broken: A message for every place that gave an error instead of a clip.

    Example:
        >>> labels = torch.tensor([0, 1])
        >>> len(Batch(torch.zeros(2, 3, 4, 8, 8), labels, labels, []))
        2
    """

    clips: Tensor
    labels: Tensor
    indices: Tensor
    broken: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def epoch_batches(length: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffles the places of a data set into batches.

    A last batch of one is left out, since BatchNorm can't train on it.

    Args:
        length: Length of the data set.
        batch_size: Places in a batch.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        The batches; the same ones for the same arguments.

    Example:
        >>> batches = epoch_batches(5, 2, seed=0, epoch=0)
        >>> [len(batch) for batch in batches]
        [2, 2]
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(length, generator=generator).tolist()
    batches = [order[i : i + batch_size] for i in range(0, length, batch_size)]
    if batches and len(batches[-1]) == 1:
        batches.pop()
    return batches


def default_workers() -> int:
    """Returns the number of reading processes that suits this machine: its cores, up to 4.

    The processes of a run that share the machine share its cores.

    Example:
        >>> 1 <= default_workers() <= 4
        True
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, len(os.sched_getaffinity(0)) // here))


def load_batches(
    dataset: ClipDataset,
    batches: Sequence[Sequence[int]],
    *,
    epoch: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Reads batches, in order, in so many processes.

    The global random generators are left alone, whatever the number of workers.

    Args:
        dataset: Where the clips come from.
        batches: Places of the data set, batch by batch.
        epoch: Handed to the data set before every read.
        workers: Reading processes; 0 reads in this one.
        pin_memory: Whether to make copies to a GPU faster.

    Yields:
        One batch for each of `batches`; it may be shorter or empty where files are broken.

    Example:
        >>> from ca3d.data.folder import VideoFolder
        >>> from ca3d.data.sampling import ClipSpec
        >>> data = VideoFolder(dataset_root, "train", clip=ClipSpec(4, 2), training=True)
        >>> [len(batch) for batch in load_batches(data, [[2, 0, 1], [3, 4]])]
        [3, 2]
    """
    loader: DataLoader[Any] = DataLoader(
        _EpochDataset(dataset, epoch),
        batch_sampler=list(batches),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        # A GPU computes elsewhere.
        worker_init_fn=functools.partial(start_worker, yields=not pin_memory),
        pin_memory=pin_memory,
        # Without its own generator every loader draws a seed from the global one.
        generator=torch.Generator().manual_seed(epoch),
    )
    yield from loader


class _EpochDataset(Dataset[Any]):
    def __init__(self, dataset: ClipDataset, epoch: int) -> None:
        self.dataset = dataset
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.dataset.set_epoch(self.epoch)
        try:
            return self.dataset[index]
        except UserError as error:
            return str(error)


def _collate(items: list[Any]) -> Batch:
    read = [item for item in items if isinstance(item, tuple)]
    return Batch(
        clips=torch.stack([item[0] for item in read]) if read else torch.empty(0),
        labels=torch.tensor([int(item[1]) for item in read], dtype=torch.int64),
        indices=torch.tensor([int(item[2]) for item in read], dtype=torch.int64),
        broken=[item for item in items if isinstance(item, str)],
    )
