"""The benchmarks that are known by name, and where their files are looked for."""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ca3d.data.benchmarks import hmdb51, kinetics400, ucf101
from ca3d.data.benchmarks.lists import class_folders
from ca3d.errors import UserError

_BENCHMARKS: dict[str, ModuleType] = {
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "kinetics400": kinetics400,
}


class Found(NamedTuple):
    """A benchmark on the disk.

    Attributes:
        name: One of `names()`.
        module: What reads it.
        split_files: Folder of the official split files.
        videos: Folder of the class folders.
    """

    name: str
    module: ModuleType
    split_files: Path
    videos: Path


def names() -> list[str]:
    """Returns the benchmarks' names.

    Example:
        >>> names()[0]
        'ucf101'
    """
    return list(_BENCHMARKS)


def find(root: Path, name: str, split_files: Path | None = None) -> Found:
    """Finds the videos and the split files of a named benchmark.

    Args:
        root: The folder of class folders, or the one that holds it.
        name: One of `names()`.
        split_files: Folder of the split files; None looks in `root` and beside it.

    Raises:
        UserError: They are not there; the message says where it was looked.
    """
    module = _BENCHMARKS[name]
    videos = _video_folder(root, module)
    if split_files is not None:
        if not split_files.is_dir():
            raise UserError(f"--split-files {split_files}: no such folder")
        return Found(name, module, split_files, videos)
    places = _places(root, module)
    # Where the user says that it is Kinetics, lists in any of its forms are its lists.
    holds = kinetics400.holds_lists if module is kinetics400 else module.holds_split_files
    for place in places:
        if holds(place):
            return Found(name, module, place, videos)
    listed = ", ".join(str(p) for p in places[:3])
    raise UserError(
        f"{root}: no official split files of {name} in {listed}; name their folder: --split-files"
    )


def detect(root: Path, split_files: Path | None = None) -> Found | None:
    """Finds out which benchmark a folder is, if it is one.

    It is one if official split files lie in it or beside it, and their classes are its folders.

    Args:
        root: The folder.
        split_files: Folder of the split files; None looks in `root` and beside it.

    Example:
        >>> detect(dataset_root) is None
        True
    """
    for name, module in _BENCHMARKS.items():
        videos = _video_folder(root, module)
        for place in [split_files] if split_files is not None else _places(root, module):
            if not module.holds_split_files(place):
                continue
            inside = place == root or root in place.parents or module is kinetics400
            if inside or class_folders(videos) & set(module.class_names(place)):
                return Found(name, module, place, videos)
    return None


def of_videos(name: str, root: Path) -> Found:
    """Returns a benchmark without its split files, for a protocol that draws its own."""
    module = _BENCHMARKS[name]
    return Found(name, module, root, _video_folder(root, module))


def _video_folder(root: Path, module: ModuleType) -> Path:
    return next((root / n for n in module.VIDEO_FOLDERS if (root / n).is_dir()), root)


def _places(root: Path, module: ModuleType) -> list[Path]:
    beside = root.absolute().parent
    named = [folder / name for folder in (root, beside) for name in module.SPLIT_FOLDERS]
    return [root, *named]
