"""HMDB51 (Kuehne et al., ICCV 2011): 51 classes, 6,766 clips, three official splits.

hmdb51_org/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi
testTrainMulti_7030_splits/brush_hair_test_split1.txt
    April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1     (0: not used, 1: training, 2: test)
"""

import re
from pathlib import Path

from ca3d.data.benchmarks.lists import OfficialLists, lines
from ca3d.data.samples import Sample
from ca3d.errors import UserError

SPLIT_FOLDERS = ("testTrainMulti_7030_splits", "test_train_splits", "hmdb51_splits")
VIDEO_FOLDERS = ("hmdb51_org", "hmdb51", "HMDB51")
FOLDS = (1, 2, 3)
_LIST = re.compile(r"(.+)_test_split([123])\.txt$")
# VIDEO_CLASS_BODY_CAMERA_PEOPLE_VIEW_QUALITY_NUMBER, for example ..._u_nm_np1_ba_goo_0
_CLIP = re.compile(r"(.+)_[a-z]_(?:cm|nm)_np\d+_[a-z]{2}_(?:goo|med|bad)_\d+$", re.IGNORECASE)


def holds_split_files(folder: Path) -> bool:
    """Whether a folder holds the official split files.

    Example:
        >>> holds_split_files(dataset_root)
        False
    """
    return any(folder.glob("*_test_split1.txt"))


def class_names(folder: Path) -> list[str]:
    """Returns the class names, from the names of the split files.

    Args:
        folder: The split files.
    """
    return sorted({m[1] for p in folder.glob("*.txt") if (m := _LIST.match(p.name))})


def group_of(path: Path, label: str) -> str:
    """Returns the video that a clip was cut from: its file name without class, tags and number.

    A film that gave clips to several classes is one group. A file that isn't named as the data
    set's are is a group of its own.

    Args:
        path: The clip.
        label: Its class.

    Example:
        >>> group_of(Path("April_09_brush_hair_u_nm_np1_ba_goo_0.avi"), "brush_hair")
        'April_09'
    """
    match = _CLIP.match(path.stem)
    if match is None:
        return f"{label}/{path.stem}"
    source = match[1]
    suffix = f"_{label}"
    return source[: -len(suffix)] if source.lower().endswith(suffix.lower()) else source


def read(folder: Path, videos: Path, fold: int) -> OfficialLists:
    """Reads an official split.

    Args:
        folder: The split files.
        videos: The folder of class folders.
        fold: 1, 2 or 3.

    Raises:
        UserError: A file is missing or malformed; the message names the line.
    """
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    classes = class_names(folder)
    for label in classes:
        file = folder / f"{label}_test_split{fold}.txt"
        for number, line in lines(file):
            words = line.rsplit(None, 1)
            if len(words) != 2 or words[1] not in ("0", "1", "2"):
                raise UserError(f"{file}, line {number}: must be VIDEO and 0, 1 or 2, got {line!r}")
            path = videos / label / words[0]
            sample = Sample(path, label, group_of(path, label))
            if words[1] != "0":
                parts["train" if words[1] == "1" else "test"].append(sample)
    return OfficialLists(parts, classes)
