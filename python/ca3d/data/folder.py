"""A data set of labelled video files: a folder per class, or lists."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ca3d.data.cache import FrameCache
from ca3d.data.reader import VideoError, VideoReader, open_video
from ca3d.data.samples import Sample, check_classes, load_info, load_samples, sided_classes
from ca3d.data.sampling import ClipSpec
from ca3d.data.transforms import Normalize, as_video, evaluation_crops, training_transform
from ca3d.errors import UserError

_LOG = logging.getLogger("ca3d.data")
# After so many unreadable files in a row it is the data set that is broken, not a file.
_ATTEMPTS = 20
_LISTED = 10

Item = tuple[Tensor, int, int]


class VideoFolder(Dataset[Item | None]):
    """Labelled clips from video files.

    In training, item i is a drawn clip of video i, augmented; everything drawn depends on (seed,
    epoch, i) alone: the same for any number of workers, and after a resume. In evaluation it is
    the centre clip, or `clips` clips x `crops` crops.

    A video that turns out to be unreadable is reported once. In training another one, drawn from
    (seed, epoch, i) too, takes its place; in evaluation the item is None, which `collate` leaves
    out. Videos that a list names and the disk lacks are reported and left out from the start.

    Args:
        root: The data set: class folders (ROOT/CLASS/VIDEO.mp4), split folders
            (ROOT/train/CLASS/VIDEO.mp4) or split lists (ROOT/train.csv with path,label[,group]).
        split: "train", "val", "test", or None for all videos.
        clip: Frames, stride, rate and size of a clip.
        training: Random and augmented clips, or fixed ones.
        seed: Source of all draws, with the epoch and the index.
        clips: Evaluation only: clips per video, spread evenly.
        crops: Evaluation only: 1 (centre) or 3 crops of a clip.
        mean: Channel means of values from 0 to 1 in the order `color`; None leaves them at 0.
        std: Channel standard deviations; None leaves them at 1.
        decoder: As in `ca3d.data.reader.open_video`.
        flip: Mirror clips in training; None: as `dataset.json` says, else yes unless a class name
            speaks of left or right.
        reverse: Play clips backwards in training; None: as `dataset.json` says, else no.
        augment: Training only: "light", the published augmentation, or "none".
        list_file: A list to take instead of the split's.
        samples: Videos to take instead of a split's or a list's.
        classes: Class names in the order of the labels; None: those of the data set, sorted.
        color: "rgb" or "bgr".
        cache: A frame cache from `ca3d.data.cache.build`; "auto" uses the one in ROOT if it is
            there and large enough; None reads the videos.

    Attributes:
        samples: The videos, one per item.
        labels: The label number of each sample.
        classes: Class names; a label is an index into them.
        missing: Videos of the list that are not on the disk.
        info: What `dataset.json` says.
        flip: Whether clips are mirrored in training, half of them.
        reverse: Whether clips are played backwards in training, half of them.

    Raises:
        UserError: Empty data set, fewer than two classes, a class folder without videos, unknown
            split, a label that is not in `classes`, or a change that the data set forbids.
        ValueError: An argument is out of range.

    Example:
        >>> data = VideoFolder(dataset_root, "train", clip=ClipSpec(4, 2, size=32, resize=32),
        ...                    training=True)
        >>> clip, label, index = data[0]
        >>> clip.shape, clip.dtype, data.classes[label], index
        (torch.Size([3, 4, 32, 32]), torch.float32, 'jump', 0)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        *,
        clip: ClipSpec,
        training: bool,
        seed: int = 0,
        clips: int = 1,
        crops: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        decoder: str = "auto",
        flip: bool | None = None,
        reverse: bool | None = None,
        augment: str = "light",
        list_file: str | os.PathLike[str] | None = None,
        samples: Sequence[Sample] | None = None,
        classes: Sequence[str] | None = None,
        color: str = "rgb",
        cache: str | os.PathLike[str] | None = "auto",
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if clips < 1:
            raise ValueError(f"clips must be at least 1, got {clips}")
        if crops not in (1, 3):
            raise ValueError(f"crops must be 1 or 3, got {crops}")
        if training and clips * crops != 1:
            raise ValueError(f"training takes one clip and crop, got {clips} clips, {crops} crops")
        self.root = Path(root)
        self.split = split
        self.clip = clip
        self.training = training
        self.seed = seed
        self.clips = clips
        self.crops = crops
        self.decoder = decoder
        self.normalize = Normalize(mean, std, color)
        self.info = load_info(root)
        if samples is None:
            samples, found = load_samples(root, split, list_file)
        else:
            found = sorted({s.label for s in samples})
        self.samples, self.missing = self._present(samples)
        self.classes = self._checked_classes(found, classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [number[s.label] for s in self.samples]
        self.flip, self._flip_reason = self._flip_choice(flip)
        self.reverse, self._reverse_reason = self._reverse_choice(reverse)
        self.augment = augment
        self._augment = training_transform(clip.size, clip.resize, self.flip, augment, self.reverse)
        # A region in pixels is one of the files' frames, not of the smaller ones in the cache.
        self._cache = None if clip.view.in_pixels else FrameCache.find(root, cache, clip.resize)
        # Shared with the loader's workers: they see a new epoch though they started before it, and
        # each broken file is reported by one of them only.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item | None:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} videos")
        index %= len(self)
        if not self.training:
            try:
                return self._evaluation_views(index), self.labels[index], index
            except VideoError as error:
                self._report(index, error)
                return None
        draw = (self.seed, int(self._epoch), index)
        chosen = index
        for attempt in range(_ATTEMPTS):
            if attempt:
                chosen = int(np.random.default_rng((*draw, attempt)).integers(len(self)))
            try:
                clip = self._training_clip(chosen, np.random.default_rng(draw))
                return clip, self.labels[chosen], chosen
            except VideoError as error:
                self._report(chosen, error)
                last = error
        raise UserError(f"{_ATTEMPTS} videos in a row cannot be read, check the data set: {last}")

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, on which the draws depend; also for workers that run already.

        Raises:
            ValueError: epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self._epoch.fill_(epoch)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the channel means and standard deviations, before a loader is made.

        Raises:
            ValueError: Not three numbers, or a std that is not positive.
        """
        self.normalize = Normalize(mean, std, self.normalize.color)

    @property
    def color(self) -> str:
        """Colour order of the clips, "rgb" or "bgr"."""
        return self.normalize.color

    @property
    def unreadable(self) -> Tensor:
        """Which videos turned out to be unreadable so far: (videos,) bool, shared with workers.

        What is set in it counts as reported.
        """
        return self._broken

    @property
    def broken(self) -> dict[Path, str]:
        """The videos that turned out to be unreadable so far, with the reason."""
        reasons = {}
        for index in self._broken.nonzero().flatten().tolist():
            path = self.samples[index].path
            try:
                self._read(index, np.zeros((1, 1), dtype=np.int64))
                reasons[path] = f"{path}: could not be read when it was needed"
            except VideoError as error:
                reasons[path] = str(error)
        return reasons

    @property
    def allowed_transforms(self) -> dict[str, bool]:
        """Which changes of a clip keep its label: horizontal_flip, reverse."""
        return {"horizontal_flip": self.flip, "reverse": self.reverse}

    def center_clip(self, index: int) -> Tensor | None:
        """Returns the centre clip of a video, uint8 (frames, 3, size, size) RGB.

        Returns:
            None if the video cannot be read, which is reported once.
        """
        try:
            with self._reader(index) as reader:
                where = self.clip.sample(reader.num_frames, reader.frames_per_second)
                frames = self.clip.read(reader, where, self.clip.resize)[0]
        except VideoError as error:
            self._report(index, error)
            return None
        return evaluation_crops(frames, self.clip.size)[0]

    def class_counts(self) -> list[int]:
        """Returns the number of videos of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def describe(self) -> str:
        """Returns a few lines for the user: what is read, how it is sampled and augmented."""
        clip, counts = self.clip, self.class_counts()
        rate = clip.frames_per_second
        at = f"at {rate:g} frames per second, resampled by time" if rate else "of the video"
        lines = [
            f"{self.info.name} [{self.split or 'all'}]: {len(self)} videos, {len(self.classes)} "
            f"classes of {min(counts)} to {max(counts)} videos",
            f"clip: {clip.frames} frames, every {_ordinal(clip.stride)} {at}; shorter side "
            f"{clip.resize}, crop {clip.size}, view {clip.view}, {self.color}",
        ]
        length, span = self.info.extra.get("frames"), (clip.frames - 1) * clip.stride + 1
        same_rate = rate in (None, self.info.frames_per_second)
        if isinstance(length, int) and length < span and same_rate:
            lines.append(
                f"a clip spans {span} frames, the videos have {length} and are looped; "
                "a smaller --stride or --frames shows them once"
            )
        if self.training:
            lines.append(
                "augmentation: random start"
                f"{', size (p 0.3), rotation (p 0.3), crop (p 0.5)' * (self.augment == 'light')}; "
                f"horizontal flip {'on' if self.flip else 'off'} ({self._flip_reason}); "
                f"reversal {'on' if self.reverse else 'off'} ({self._reverse_reason})"
            )
        else:
            lines.append(f"views: {self.clips} clips x {self.crops} crops of each video")
        if self._cache is not None:
            lines.append(f"frames from the cache {self._cache.folder}")
        if self.missing:
            lines.append(f"{len(self.missing)} listed videos are missing")
        return "\n".join(lines)

    def _present(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Path]]:
        present = [s for s in samples if s.path.is_file()]
        missing = [s.path for s in samples if not s.path.is_file()]
        if missing:
            names = ", ".join(str(p) for p in missing[:_LISTED])
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            message = f"{len(missing)} of {len(samples)} listed videos are missing: {names}{more}"
            if not present:
                raise UserError(f"{self.root}: {message}")
            _LOG.warning("%s: %s; they are left out", self.root, message)
        return present, missing

    def _checked_classes(self, found: list[str], given: Sequence[str] | None) -> list[str]:
        if isinstance(given, str):
            raise UserError(f"classes must be a list of names, not the text {given!r}")
        if not self.samples:
            raise UserError(f"{self.root}: there is no video among the samples")
        classes = list(found if given is None else given)
        check_classes(classes, self.root)
        if len(classes) < 2:
            raise UserError(
                f"{self.root}: a single class ({classes[0]!r}) cannot be told from anything: "
                "give at least two class folders"
            )
        unknown = sorted({s.label for s in self.samples} - set(classes))
        if unknown:
            raise UserError(
                f"{self.root}: class {unknown[0]!r} is not among the {len(classes)} classes asked "
                f"for ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
            )
        return classes

    def _flip_choice(self, asked: bool | None) -> tuple[bool, str]:
        choice = self._choice("flip", "mirrored video", asked, self.info.horizontal_flip)
        if choice is not None:
            return choice
        sided = sided_classes(self.classes)
        if sided:
            return False, f"the class name {sided[0]!r} speaks of a side"
        return True, "no class name speaks of left or right"

    def _reverse_choice(self, asked: bool | None) -> tuple[bool, str]:
        choice = self._choice("reverse", "video played backwards", asked, self.info.reverse)
        return choice or (False, "dataset.json does not allow it")

    def _choice(
        self, name: str, changed: str, asked: bool | None, declared: bool | None
    ) -> tuple[bool, str] | None:
        """Whether a change of clips was asked for or declared, and which; None: neither."""
        if asked and declared is False:
            raise UserError(
                f"{self.root}: dataset.json says that a {changed} changes its label: set {name} "
                "to false"
            )
        if asked is not None:
            return asked, "as asked for"
        return None if declared is None else (declared, "as dataset.json says")

    def _reader(self, index: int) -> VideoReader:
        path = self.samples[index].path
        if self._cache is not None:
            cached = self._cache.open(path, self.decoder)
            if cached is not None:
                return cached
        return open_video(path, self.decoder)

    def _read(self, index: int, positions: np.ndarray) -> Tensor:
        with self._reader(index) as reader:
            return self.clip.read(reader, positions, self.clip.resize)

    def _training_clip(self, index: int, rng: np.random.Generator) -> Tensor:
        with self._reader(index) as reader:
            where = self.clip.sample(reader.num_frames, reader.frames_per_second, rng, "random")
            frames = self.clip.read(reader, where, self.clip.resize)[0]
        # The transforms draw from torch's global generator: lend it to them seeded, for this clip.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            frames = self._augment(as_video(frames))
        return self.normalize(frames)

    def _evaluation_views(self, index: int) -> Tensor:
        with self._reader(index) as reader:
            where = self.clip.sample(
                reader.num_frames, reader.frames_per_second, mode="uniform", clips=self.clips
            )
            frames = self.clip.read(reader, where, self.clip.resize)
        views = evaluation_crops(frames, self.clip.size, self.crops)
        clips = self.normalize(views.transpose(0, 1).flatten(0, 1))
        return clips if self.clips * self.crops > 1 else clips[0]

    def _report(self, index: int, error: VideoError) -> None:
        if not self._broken[index]:
            self._broken[index] = True
            instead = "another video is used" if self.training else "it is left out"
            _LOG.warning("%s; %s", error, instead)


def collate(batch: Sequence[Item | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Stacks the items of a `VideoFolder`, leaving out those that could not be read.

    Args:
        batch: Items; None for an unreadable video in evaluation.

    Returns:
        (clips (B, ...), labels int64 (B,), indices int64 (B,)); B may be 0, clips is then (0,).

    Example:
        >>> clips, labels, indices = collate([(torch.zeros(3, 4, 8, 8), 1, 7), None])
        >>> clips.shape, labels.tolist(), indices.tolist()
        (torch.Size([1, 3, 4, 8, 8]), [1], [7])
    """
    items = [item for item in batch if item is not None]
    labels = torch.tensor([item[1] for item in items], dtype=torch.int64)
    indices = torch.tensor([item[2] for item in items], dtype=torch.int64)
    clips = torch.stack([item[0] for item in items]) if items else torch.empty(0)
    return clips, labels, indices


def _ordinal(stride: int) -> str:
    return {1: "frame", 2: "2nd frame", 3: "3rd frame"}.get(stride, f"{stride}th frame")
