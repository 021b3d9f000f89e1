"""How a result was measured: results of different protocols can't be compared."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ca3d.data.samples import Sample

PUBLISHED_SEED = 100
# The published code reads 20 frames for a clip of 16, and takes 16 in a row out of them.
PUBLISHED_WINDOW = 20


@dataclass(frozen=True)
class Protocol:
    """The protocol of a run.

    Attributes:
        name: "official" (the data set's own split files), "published" (the paper's: a random split
            over clips), "lists" (split files or folders of the user's), "random" (drawn over
            clips) or "grouped" (drawn, with the clips of a recording on one side).
        dataset: Name of the benchmark, or of the folder.
        fold: Which official split; None where there is one only.
        seed: Of what was drawn.
        val_fraction: Share of the training videos that validation holds out, where it is drawn.

    Example:
        >>> str(Protocol("official", "ucf101", fold=1))
        'official split 1 of ucf101'
    """

    name: str
    dataset: str
    fold: int | None = None
    seed: int | None = None
    val_fraction: float | None = None

    def __str__(self) -> str:
        split = f" split {self.fold}" if self.fold is not None else ""
        return f"{self.name}{split} of {self.dataset}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)


def published_split(samples: Sequence[Sample], root: Path) -> dict[str, list[Sample]]:
    """Divides samples as the published code does: over clips, whatever recording they are from.

    The sorted list is shuffled by Python's generator with seed 100; the first int(0.70 N) train,
    the next int(0.15 N) validate, the rest test. Clips of one recording fall on both sides, so the
    accuracy says little about unseen recordings.

    Args:
        samples: All samples.
        root: Paths are sorted relative to it.

    Returns:
        "train", "val" and "test".

    Example:
        >>> clips = [Sample(Path(f"walk/{i:02d}.mp4"), "walk") for i in range(20)]
        >>> parts = published_split(clips, Path("."))
        >>> {name: len(part) for name, part in parts.items()}, parts["val"][0].path.name
        ({'train': 14, 'val': 3, 'test': 3}, '11.mp4')
    """

    def key(sample: Sample) -> str:
        inside = sample.path.is_relative_to(root)
        return (sample.path.relative_to(root) if inside else sample.path).as_posix()

    ordered = sorted(samples, key=key)
    places = list(range(len(ordered)))
    random.Random(PUBLISHED_SEED).shuffle(places)
    first = int(0.70 * len(ordered))
    second = first + int(0.15 * len(ordered))
    cuts = {"train": places[:first], "val": places[first:second], "test": places[second:]}
    return {name: [ordered[i] for i in cut] for name, cut in cuts.items()}
