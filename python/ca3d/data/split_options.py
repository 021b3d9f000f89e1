"""The options by which a user says which data set and split a folder of videos is.

Apart from what acts on them, so that the command line can print its help without torch.
"""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ca3d.errors import UserError
from ca3d.options import option


@dataclass(kw_only=True)
class SplitOptions:
    """Options of every command that reads a data set.

    Example:
        >>> SplitOptions(dataset="ucf101", fold=2).fold
        2
    """

    dataset: Literal["auto", "folder", "ucf101", "hmdb51", "kinetics400"] = option(
        "auto",
        "Which data set DATA is; 'auto' sees it by the official split files in DATA or beside it,"
        " unless DATA has a train.csv (path,label) of its own",
        "Data",
    )
    split_files: str | None = option(
        None, "Folder of the official split files (default: in DATA or beside it)", "Data"
    )
    fold: int = option(1, "Which official split, 1 to 3, of UCF101 and HMDB51", "Data")
    protocol: Literal["official", "published"] = option(
        "official",
        "'published': the paper's random 70/15/15 split over clips, seed 100, on BGR frames; its"
        " results are not comparable with those on official splits",
        "Data",
    )

    def validate_split(self) -> None:
        """Raises `UserError` for the first of these options whose value is not allowed."""
        if self.fold not in (1, 2, 3):
            raise UserError(f"--fold must be 1, 2 or 3, not {self.fold!r}")
        if self.dataset == "folder" and self.split_files is not None:
            raise UserError("--split-files needs a data set with official splits, not folder")
        if self.dataset in ("folder", "kinetics400") and self.fold != 1:
            raise UserError(f"--fold {self.fold}: --dataset {self.dataset} has one split")
