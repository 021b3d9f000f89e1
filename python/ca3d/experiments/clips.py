"""Clips that lie in memory, decoded or rendered once and shared by all runs of a grid."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ca3d.data.benchmarks import Protocol
from ca3d.data.embedded.intervals import SPLITS
from ca3d.data.embedded.maker import names
from ca3d.data.embedded.recipe import Recipe
from ca3d.data.samples import Sample
from ca3d.data.sampling import ClipSpec
from ca3d.errors import UserError
from ca3d.experiments.recordings import divide, recording_of, recordings
from ca3d.training.checkpoint import write_file
from ca3d.training.datasets import Data

__all__ = ["CONTROLS", "ClipSet", "load"]

#: None; one frame of each clip, repeated; the clip's frames in random order.
CONTROLS = (None, "frames", "shuffled")

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Shows nothing.

    Example:
        >>> silent("not shown")
    """


class ClipSet:
    """One split of clips in memory: a `ca3d.training.loader.ClipDataset`.

    Args:
        clips: (clips, 3, frames, height, width) uint8.
        labels: (clips,) class numbers.
        classes: Class names.
        groups: What recording each clip comes from, where that is known.
        name: Of the split; the clips' paths begin with it.
        mean: Channel means in [0, 1] that are subtracted.
        std: Channel standard deviations.
        control: One of `CONTROLS`. A model that is given less than the clips can only use what is
            left: "frames" leaves no motion, "shuffled" no order.
        training: Whether the control draws anew in every epoch.
        seed: Of these draws.

    Raises:
        ValueError: An unknown control, or lengths that differ.

    Example:
        >>> clips = torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8)
        >>> data = ClipSet(clips, [0, 1], ["a", "b"], mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> clip, label, index = data[1]
        >>> clip.shape, float(clip.mean()), label
        (torch.Size([3, 4, 8, 8]), -2.0, 1)
    """

    def __init__(
        self,
        clips: Tensor,
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        groups: Sequence[str] | None = None,
        name: str = "clips",
        mean: Sequence[float],
        std: Sequence[float],
        control: str | None = None,
        training: bool = False,
        seed: int = 0,
    ) -> None:
        if control not in CONTROLS:
            raise ValueError(f"control must be one of {CONTROLS}, got {control!r}")
        if len(clips) != len(labels):
            raise ValueError(f"{len(clips)} clips need as many labels, got {len(labels)}")
        self.clips, self.labels, self.classes = clips, list(labels), list(classes)
        self.samples = [
            Sample(Path(name, str(i)), self.classes[label], None if groups is None else groups[i])
            for i, label in enumerate(labels)
        ]
        self.control, self.training, self.seed = control, training, seed
        self._epoch = 0
        # (x / 255 - mean) / std as one product and one sum.
        shape = (3, 1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32).view(shape))
        shift = torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
        self._shift = shift.view(shape)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        clip = self.clips[index]
        if self.control is not None:
            clip = clip[:, self._chosen_frames(index, clip.shape[1])]
        return clip.float().mul_(self._scale).sub_(self._shift), self.labels[index], index

    def set_epoch(self, epoch: int) -> None:
        """Makes later draws those of `epoch`."""
        self._epoch = epoch

    @property
    def unreadable(self) -> Tensor:
        """No clip: they are in memory."""
        return torch.zeros(len(self), dtype=torch.bool)

    @property
    def broken(self) -> dict[Path, str]:
        """No file: the clips are in memory."""
        return {}

    def _chosen_frames(self, index: int, frames: int) -> list[int]:
        rng = np.random.default_rng((self.seed, self._epoch, index) if self.training else index)
        if self.control == "shuffled":
            return rng.permutation(frames).tolist()
        return [int(rng.integers(frames)) if self.training else frames // 2] * frames


def load(data: Mapping[str, Any], folder: Path, seed: int = 0, say: Say = silent) -> Data:
    """Renders the clips of a cell's data, or reads them where that was done before.

    Args:
        data: name (one of the embedded data sets), train, val and test (clips of each split),
            frames and size of a clip, step (frames of the rendering from one frame to the next),
            scale (the rendering has so many times the size), control (one of `CONTROLS`), and
            segments, views, clutter and seed as in `ca3d.data.embedded`. With a division
            (`ca3d.experiments.recordings`), every `cuts` clips are of one recording. All but the
            name have defaults. (score_train says whether the accuracy on the train split is
            wanted.)
        folder: Where clips are kept.
        seed: Of the draws of the control.
        say: Shows a line to the user.

    Returns:
        The three splits in memory.

    Raises:
        ca3d.errors.UserError: An unknown name or key.

    Example:
        >>> sizes = {"train": 8, "val": 8, "test": 8, "frames": 4, "size": 16}
        >>> data = load({"name": "motion-order", **sizes, "step": 4}, scratch)
        >>> len(data.train), len(data.classes), data.train[0][0].shape
        (8, 8, torch.Size([3, 4, 16, 16]))
    """
    values = complete(data)
    control = values.pop("control")
    values.pop("score_train")
    if values["division"] is None:
        del values["division"], values["cuts"]
    clips = _clips(json.dumps(values, sort_keys=True), folder, say)
    recipe = _recipe(values)
    parts = _parts(values)
    share = clips["train"].transpose(0, 1).flatten(1)[:, ::7].double() / 255
    mean, std = tuple(share.mean(1).tolist()), tuple(share.std(1).tolist())

    def split_of(name: str) -> ClipSet:
        return ClipSet(
            clips[name],
            [recipe.label(i) for i in parts[name]],
            recipe.classes,
            groups=_groups(values, parts[name]),
            name=name,
            mean=mean,
            std=std,
            control=control,
            training=name == "train",
            seed=seed,
        )

    training = split_of("train")
    return Data(
        train=training,
        val=split_of("val"),
        test=split_of("test"),
        classes=list(recipe.classes),
        train_labels=training.labels,
        clip=ClipSpec(
            frames=values["frames"],
            stride=values["step"],
            frames_per_second=float(recipe.frames_per_second),
            size=values["size"],
            resize=values["size"],
        ),
        mean=mean,
        std=std,
        trained_on=values["name"],
        protocol=Protocol("lists", values["name"]),
    )


@functools.lru_cache(maxsize=2)
def _clips(text: str, folder: Path, say: Say) -> dict[str, Tensor]:
    """(clips, 3, frames, size, size) uint8 of each split; `text` says in JSON what they show."""
    values = json.loads(text)
    file = folder / f"{values['name']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(values[split] for split in SPLITS)
        size = f"{values['frames']}x{values['size']}x{values['size']}"
        say(f"rendering {total} clips of {values['name']}, {size}")
        train, val, test = _render(values)
        buffer = io.BytesIO()
        np.savez(buffer, train=train, val=val, test=test)
        write_file(file, buffer.getvalue())
    with np.load(file) as stored:
        return {split: torch.from_numpy(stored[split]) for split in SPLITS}


_DEFAULTS: dict[str, Any] = {
    "train": 1600,
    "val": 400,
    "test": 400,
    "frames": 8,
    "size": 16,
    "step": 2,
    "scale": 2,
    "control": None,
    "score_train": True,
    "segments": 2,
    "views": "side",
    "clutter": 0.0,
    "seed": 0,
    "division": None,
    "cuts": 4,
}


def complete(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in the defaults of a cell's data.

    Args:
        data: See `load`.

    Raises:
        ca3d.errors.UserError: An unknown name or key.

    Example:
        >>> complete({"name": "mocap30", "size": 32})["frames"]
        8
    """
    if data.get("name") not in names():
        known = ", ".join(names())
        raise UserError(f"data set {data.get('name')!r} is not rendered here; choose from {known}")
    unknown = sorted(set(data) - {"name", *_DEFAULTS})
    if unknown:
        raise UserError(f"{unknown[0]!r} is nothing that clips of {data['name']} have")
    return {"name": data["name"], **_DEFAULTS, **data}


def _recipe(values: Mapping[str, Any]) -> Recipe:
    return Recipe(
        values["name"],
        size=values["size"] * values["scale"],
        frames=values["frames"] * values["step"],
        frames_per_second=16,
        clutter=values["clutter"],
        seed=values["seed"],
        segments=values["segments"],
        views=values["views"],
    )


def _parts(values: Mapping[str, Any]) -> dict[str, list[int]]:
    """Which of the rendered clips each split has."""
    sizes = {split: values[split] for split in SPLITS}
    if "division" not in values:
        return {split: list(range(size)) for split, size in sizes.items()}
    recipe, total = _recipe(values), sum(sizes.values())
    groups = [recording_of(recipe, i, values["cuts"]) for i in range(total)]
    return divide(groups, sizes, values["division"])


def _groups(values: Mapping[str, Any], part: Sequence[int]) -> list[str] | None:
    if "division" not in values:
        return None
    recipe = _recipe(values)
    return [recording_of(recipe, i, values["cuts"]) for i in part]


def _render(values: Mapping[str, Any]) -> list[np.ndarray]:
    """(clips, 3, frames, size, size) uint8 of each split.

    A pixel is the mean of scale x scale rendered ones.
    """
    recipe, parts = _recipe(values), _parts(values)

    def clip_of(frames: np.ndarray) -> np.ndarray:
        video = torch.from_numpy(frames[:: values["step"]]).permute(0, 3, 1, 2).float()
        return F.avg_pool2d(video, values["scale"]).round().byte().transpose(0, 1).numpy()

    if "division" not in values:
        return [
            np.stack([clip_of(recipe.render(split, i)[0]) for i in parts[split]])
            for split in SPLITS
        ]
    total = sum(map(len, parts.values()))
    clips = [clip_of(frames) for frames, _, _ in recordings(recipe, total, values["cuts"])]
    return [np.stack([clips[i] for i in parts[split]]) for split in SPLITS]
