"""What the readers of official split files share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ca3d.data.reader import VIDEO_SUFFIXES
from ca3d.data.samples import Sample
from ca3d.errors import UserError


class OfficialLists(NamedTuple):
    """What the split files of a benchmark say.

    Attributes:
        parts: The samples of "train", "test" and, where there is an official one, "val"; their
            files need not exist. Every sample has a group.
        classes: All class names, sorted.
        notes: Sentences on how the files were read.
    """

    parts: dict[str, list[Sample]]
    classes: list[str]
    notes: tuple[str, ...] = ()


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (number, text) of the lines of a text file that aren't empty.

    Raises:
        UserError: The file is missing or no text.

    Example:
        >>> file = scratch / "classInd.txt"
        >>> _ = file.write_text("1 ApplyEyeMakeup\\n\\n")
        >>> list(lines(file))
        [(1, '1 ApplyEyeMakeup')]
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such split file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def videos_below(root: Path) -> dict[str, Path]:
    """Returns every video in a folder and its sub-folders by its name without the suffix.

    Example:
        >>> sorted(videos_below(dataset_root / "walk"))
        ['0', '1', '2', '3', '4']
    """
    found: dict[str, Path] = {}
    for where, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith("."):
                found.setdefault(os.path.splitext(name)[0], Path(where, name))
    return found


def class_folders(root: Path) -> set[str]:
    """Returns the names of a folder's sub-folders.

    Example:
        >>> sorted(class_folders(dataset_root))
        ['jump', 'walk']
    """
    if not root.is_dir():
        return set()
    return {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
