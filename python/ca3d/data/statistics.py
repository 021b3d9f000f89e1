"""Channel means and standard deviations of a data set."""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ca3d.data.folder import VideoFolder
from ca3d.data.workers import start_worker
from ca3d.errors import UserError

Triple = tuple[float, float, float]


def measure(
    dataset: VideoFolder,
    *,
    limit: int | None = 2000,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Triple, Triple]:
    """Measures mean and standard deviation of the centre clips, in the data set's colour order.

    mean = E[x] and std = sqrt(E[x^2] - E[x]^2) over all pixels of all clips, x from 0 to 1. Sums
    are whole numbers, so the result does not depend on the number of workers.

    Args:
        dataset: The training split.
        limit: At most so many videos, spread evenly over the data set; None for all.
        workers: Processes that read; 0 reads here.
        progress: Called after each video with (done, total).

    Returns:
        (mean, std), each of three floats.

    Raises:
        UserError: No video can be read.
        ValueError: limit is below 1.

    Example:
        >>> from ca3d.data.sampling import ClipSpec
        >>> data = VideoFolder(dataset_root, "train", clip=ClipSpec(4, 2, size=32, resize=32),
        ...                    training=True)
        >>> mean, std = measure(data)
        >>> [round(m, 2) for m in mean]
        [0.1, 0.11, 0.1]
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    total = min(len(dataset), limit or len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, total).round().astype(int).tolist()
    loader: DataLoader[list[int]] = DataLoader(
        _ChannelSums(dataset, chosen),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=None,
        worker_init_fn=start_worker,
    )
    sums = [0] * 7
    for done, row in enumerate(loader, 1):
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        if progress is not None:
            progress(done, total)
    count = sums[0]
    if count == 0:
        raise UserError(f"{dataset.root}: no video can be read, check the data set")
    first = [s / (255 * count) for s in sums[1:4]]
    second = [s / (255 * 255 * count) for s in sums[4:7]]
    # A set of one colour has no spread; dividing by 0 must not follow from it.
    spread = [max(b - a * a, 0.0) ** 0.5 or 1.0 for a, b in zip(first, second, strict=True)]
    return (first[0], first[1], first[2]), (spread[0], spread[1], spread[2])


class _ChannelSums(Dataset[list[int]]):
    """Pixel count, sums and sums of squares (7 numbers) of the centre clip of some videos.

    Plain numbers: a process takes longer to hand a small tensor over than to sum up a clip.
    """

    def __init__(self, dataset: VideoFolder, chosen: list[int]) -> None:
        self.dataset = dataset
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, item: int) -> list[int]:
        clip = self.dataset.center_clip(self.chosen[item])
        if clip is None:
            return [0] * 7
        channels = clip.movedim(-3, 0).flatten(1).to(torch.int64)
        if self.dataset.color == "bgr":
            channels = channels.flip(0)
        squares = channels * channels
        return [channels.shape[1], *channels.sum(1).tolist(), *squares.sum(1).tolist()]
