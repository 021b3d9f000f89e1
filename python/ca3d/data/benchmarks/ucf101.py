"""UCF101 (Soomro et al., arXiv:1212.0402): 101 classes, 13,320 clips, three official splits.

UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
ucfTrainTestlist/classInd.txt       1 ApplyEyeMakeup
ucfTrainTestlist/trainlist01.txt    ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
ucfTrainTestlist/testlist01.txt     ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
"""

import re
from pathlib import Path

from ca3d.data.benchmarks.lists import OfficialLists, lines
from ca3d.data.samples import Sample
from ca3d.errors import UserError

SPLIT_FOLDERS = ("ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask")
VIDEO_FOLDERS = ("UCF-101", "UCF101")
FOLDS = (1, 2, 3)
_CLIP = re.compile(r"(v_.+_g\d+)_c\d+$", re.IGNORECASE)


def holds_split_files(folder: Path) -> bool:
    """Whether a folder holds the official split files.

    Example:
        >>> holds_split_files(dataset_root)
        False
    """
    return (folder / "classInd.txt").is_file() and (folder / "trainlist01.txt").is_file()


def class_names(folder: Path) -> list[str]:
    """Returns the class names of classInd.txt.

    Args:
        folder: The split files.

    Raises:
        UserError: A line is not `NUMBER NAME`.
    """
    return list(_class_index(folder))


def group_of(path: Path, label: str) -> str:
    """Returns the source video that a clip was cut from: class and `gXX` of its file name.

    Clips of one group share a scene and people; `g08` of two classes are different videos.

    Args:
        path: The clip.
        label: Its class.

    Example:
        >>> group_of(Path("v_Archery_g08_c01.avi"), "Archery")
        'v_Archery_g08'
    """
    match = _CLIP.match(path.stem)
    return match[1] if match else f"{label}/{path.stem}"


def read(folder: Path, videos: Path, fold: int) -> OfficialLists:
    """Reads an official split.

    Args:
        folder: The split files.
        videos: The folder of class folders.
        fold: 1, 2 or 3.

    Raises:
        UserError: A file is missing or malformed; the message names the line.
    """
    classes = _class_index(folder)
    parts: dict[str, list[Sample]] = {}
    for part, name in (("train", "trainlist"), ("test", "testlist")):
        file = folder / f"{name}{fold:02d}.txt"
        parts[part] = []
        for number, line in lines(file):
            words = line.rsplit(None, 1)
            clip, index = (words[0], words[1]) if words[-1].isdigit() else (line, None)
            label, slash, _ = clip.replace("\\", "/").partition("/")
            if not slash or label not in classes:
                raise UserError(
                    f"{file}, line {number}: must be CLASS/VIDEO with a class of classInd.txt, "
                    f"got {line!r}"
                )
            if index is not None and int(index) != classes[label]:
                raise UserError(
                    f"{file}, line {number}: class {label} has number {classes[label]} in "
                    f"classInd.txt, got {index}"
                )
            path = videos / clip.replace("\\", "/")
            parts[part].append(Sample(path, label, group_of(path, label)))
    return OfficialLists(parts, sorted(classes))


def _class_index(folder: Path) -> dict[str, int]:
    file, found = folder / "classInd.txt", {}
    for number, line in lines(file):
        words = line.split(None, 1)
        if len(words) != 2 or not words[0].isdigit():
            raise UserError(f"{file}, line {number}: must be NUMBER NAME, got {line!r}")
        found[words[1].strip()] = int(words[0])
    return found
