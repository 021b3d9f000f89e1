"""Which videos of a data set train, validate and test, by protocol."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ca3d.data import samples as lists
from ca3d.data import splits
from ca3d.data.benchmarks import registry
from ca3d.data.benchmarks.protocol import PUBLISHED_SEED, Protocol, published_split
from ca3d.data.samples import Sample, data_folder
from ca3d.data.split_options import SplitOptions
from ca3d.errors import UserError

VAL_FRACTION = 0.15


@dataclass(frozen=True)
class Partition:
    """A data set, divided.

    Attributes:
        splits: The samples of "train", "val" and "test"; their files need not exist.
        classes: All class names, sorted.
        protocol: How it was divided.
        notes: Sentences on it for the user.
    """

    splits: splits.Split
    classes: list[str]
    protocol: Protocol
    notes: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """Returns one line: protocol and number of videos of each part."""
        counts = ", ".join(f"{len(part)} {name}" for name, part in self.splits.items())
        return f"{self.protocol}: {counts}"


def partition(
    root: str | os.PathLike[str],
    options: SplitOptions,
    *,
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
) -> Partition | None:
    """Divides a data set by its official split files or by the published protocol.

    Validation is never official (but for Kinetics-400): it is a share of the source videos of the
    training list, class by class as far as that goes, by `seed`. The test list selects nothing.

    Args:
        root: The data set.
        options: Which data set, split and protocol.
        val_fraction: Share of the training videos for validation.
        seed: Of the draw of validation videos.

    Returns:
        The parts; None for a folder that is no known benchmark, by the official protocol: it then
        has its own lists, or none.

    Raises:
        UserError: The split files are missing or malformed, or the options don't fit the data.

    Example:
        >>> published = partition(dataset_root, SplitOptions(protocol="published"))
        >>> published.describe()
        'published of example: 7 train, 1 val, 2 test'
        >>> partition(dataset_root, SplitOptions()) is None
        True
    """
    options.validate_split()
    folder = data_folder(root)
    found = _find(folder, options)
    if options.fold != 1 and (found is None or options.protocol == "published"):
        lacks = "the published protocol has" if found is not None else f"{root} has"
        raise UserError(f"--fold {options.fold}: {lacks} no official splits")
    if options.protocol == "published":
        return _published(folder, found)
    if found is None:
        return None
    if options.fold not in found.module.FOLDS:
        raise UserError(f"--fold {options.fold}: {found.name} has one split")
    official = found.module.read(found.split_files, found.videos, options.fold)
    parts, repeated = _once_each(official.parts)
    for name, part in parts.items():
        if not part:
            raise UserError(f"{found.split_files}: lists no {name} videos")
    notes = [*official.notes, f"split files of {found.name}: {found.split_files}"]
    if repeated:
        notes.append(f"{repeated} rows repeat a video of the same list and are left out")
    drawn = "val" not in parts and val_fraction > 0
    if drawn:
        shares = {"train": 1 - val_fraction, "val": val_fraction}
        parts = {**splits.random_split(parts["train"], shares, seed), "test": parts["test"]}
        sources = len({s.group for s in parts["val"]})
        notes.append(
            f"validation: {len(parts['val'])} clips of {sources} source videos of the training "
            f"list, seed {seed}"
        )
    protocol = Protocol(
        "official",
        found.name,
        fold=options.fold if len(found.module.FOLDS) > 1 else None,
        seed=seed if drawn else None,
        val_fraction=val_fraction if drawn else None,
    )
    return Partition(parts, official.classes, protocol, tuple(notes))


def _once_each(parts: splits.Split) -> tuple[splits.Split, int]:
    """The parts with every file once, and how many rows were left out for it."""
    once = {name: list({s.path: s for s in part}.values()) for name, part in parts.items()}
    return once, sum(len(parts[name]) - len(part) for name, part in once.items())


def _find(root: Path, options: SplitOptions) -> registry.Found | None:
    split_files = None if options.split_files is None else Path(options.split_files)
    if options.dataset == "folder":
        return None
    if options.dataset != "auto":
        drawn = options.dataset != "kinetics400" or _has_split_folders(root)
        if options.protocol == "published" and drawn:
            seen = registry.detect(root)
            if seen is not None and seen.name != options.dataset:
                raise UserError(
                    f"--dataset {options.dataset}: {root} is {seen.name}, by its split files"
                    f" {seen.split_files}"
                )
            return registry.of_videos(options.dataset, root)
        return registry.find(root, options.dataset, split_files)
    found = registry.detect(root, split_files)
    if split_files is not None and found is None:
        raise UserError(
            f"--split-files {split_files}: no split files of {', '.join(registry.names())} whose"
            f" classes are folders of {root}; say which with --dataset"
        )
    own = found is not None and found.name != "kinetics400" and bool(lists.splits_of(root))
    return None if own and split_files is None else found


def _published(root: Path, found: registry.Found | None) -> Partition:
    name = found.name if found is not None else lists.load_info(root).name
    folder = found.videos if found is not None else root
    if _has_split_folders(folder):
        # As published for Kinetics: folders train, val and test are taken as they are.
        parts = {part: lists.load_samples(folder, part)[0] for part in lists.splits_of(folder)}
        _, classes = lists.load_samples(folder)
        return Partition(parts, classes, Protocol("published", name))
    if found is not None and found.name == "kinetics400":
        official = found.module.read(found.split_files, found.videos, 1)
        if "val" not in official.parts:
            raise UserError(f"{root}: the published protocol needs train, val and test lists")
        return Partition(official.parts, official.classes, Protocol("published", name))
    everything = lists.find_samples(folder)
    if found is not None:
        group_of = found.module.group_of
        everything = [Sample(s.path, s.label, group_of(s.path, s.label)) for s in everything]
    parts = published_split(everything, folder)
    empty = [part for part, samples in parts.items() if not samples]
    if empty:
        raise UserError(f"{root}: too few videos for a published {empty[0]} split")
    classes = sorted({s.label for s in everything})
    notes = ("a random split over clips: recordings lie on both sides of it",)
    return Partition(parts, classes, Protocol("published", name, seed=PUBLISHED_SEED), notes)


def _has_split_folders(root: Path) -> bool:
    return any(path.is_dir() for path in lists.splits_of(root).values())
