"""The three splits of a run: which files, which frame rate, which statistics."""

from __future__ import annotations

import json
import statistics as figures
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ca3d import weights
from ca3d.data import samples as lists
from ca3d.data import splits, statistics
from ca3d.data.background import background_index
from ca3d.data.benchmarks import Protocol, partition
from ca3d.data.benchmarks.protocol import PUBLISHED_WINDOW
from ca3d.data.folder import VideoFolder
from ca3d.data.reader import VideoError, open_video
from ca3d.data.samples import Sample
from ca3d.data.sampling import ClipSpec
from ca3d.data.view import View
from ca3d.errors import UserError
from ca3d.training.config import TrainConfig
from ca3d.training.distributed import World
from ca3d.training.loader import ClipDataset, default_workers
from ca3d.training.logs import write_csv, write_json

# So many files are asked for their frame rate when the data set does not say it.
PROBED_FILES = 25
_LISTED = 10


@dataclass
class Data:
    """What a run trains, validates and tests on.

    Args:
        train: Training clips, drawn at random.
        val: Central clips for choosing the best epoch, or None.
        test: Central clips for the final figure, or None.
        classes: Class names; a label is a place in this list.
        train_labels: Label of every training video.
        clip: Length, frame rate and size of a clip.
        mean: Channel means of the training split, in the order `color`, in [0, 1].
        std: Channel standard deviations.
        trained_on: What a model trained on this names as its training data.
        protocol: How the videos were divided.
        color: Order of the colour channels, "rgb" or "bgr".
        missing: Number of listed videos that are not on the disk.
    """

    train: ClipDataset
    val: ClipDataset | None
    test: ClipDataset | None
    classes: list[str]
    train_labels: list[int]
    clip: ClipSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    trained_on: str
    protocol: Protocol
    color: str = "rgb"
    missing: int = 0

    def model_info(self, model: nn.Module, config: TrainConfig) -> weights.ModelInfo:
        """Returns what is stored with the weights of a model trained on this data.

        Args:
            model: The model, with its `name` and `options`.
            config: The options of the run.
        """
        return weights.ModelInfo(
            model=str(model.name),
            options=dict(model.options),  # type: ignore[arg-type]
            classes=tuple(self.classes),
            mean=self.mean,
            std=self.std,
            frames=self.clip.frames,
            size=self.clip.size,
            resize=self.clip.resize,
            **self.clip_info(),
            precision=config.precision,
            trained_on=self.trained_on,
            extra={"protocol": self.protocol.to_dict()},
        )

    def clip_info(self) -> dict[str, Any]:
        """Returns what a model sees, by names of `ca3d.weights.ModelInfo`, but shape and scale."""
        return {
            "color": self.color,
            "stride": self.clip.stride,
            "frames_per_second": self.clip.frames_per_second,
            "window": self.clip.window,
            "view": str(self.clip.view),
        }

    def list_unreadable(self, folder: Path, world: World) -> int:
        """Writes the videos that could not be read so far, by any process, into the run folder.

        Args:
            folder: The run folder.
            world: The processes of the run.

        Returns:
            Their number.
        """
        parts = {"train": self.train, "val": self.val, "test": self.test}
        rows = []
        for name, dataset in parts.items():
            if dataset is not None:
                world.any_of(dataset.unreadable)
                rows += [
                    {"path": str(path), "split": name, "reason": reason}
                    for path, reason in (dataset.broken if world.is_first else {}).items()
                ]
        if rows:
            write_csv(folder / "splits" / "unreadable.csv", rows)
        return len(rows)


def prepare_data(
    config: TrainConfig, folder: Path, say: Callable[[str], None], saved: bool = False
) -> Data:
    """Finds the videos of a run, splits them, and measures what the model needs to know.

    The lists of the run's videos, those that are missing, and the statistics are left in the run
    folder. A run that is resumed takes them from there.

    Args:
        config: The options of the run.
        folder: The run folder.
        say: Shows a line to the user.
        saved: Take everything from the run folder, as a further process of the run does, and write
            nothing.

    Returns:
        The splits.

    Raises:
        ca3d.errors.UserError: There is no data, one class, or one video in two splits.
    """
    if not config.data:
        raise UserError("DATA must name a folder with one sub-folder of videos per class")
    info = lists.load_info(config.data)
    published = config.protocol == "published"
    known = _read_known(folder) if saved or (folder / "resume.pt").is_file() else {}
    if known:
        parts = _saved_splits(config, folder)
        classes, protocol = known["classes"], Protocol(**known["protocol"])
    else:
        parts, classes, protocol = _divide(config, say)
        known = _keep_lists(config, folder, parts, classes, protocol, say)
        parts = _saved_splits(config, folder)
    fps = None
    if not published:
        fps = config.fps or known.get("frames_per_second") or info.frames_per_second
        fps = float(fps or _usual_rate(parts["train"], config.decoder))
    clip = ClipSpec(
        frames=config.frames,
        stride=config.stride,
        frames_per_second=fps,
        size=config.size,
        resize=config.resize or config.size,
        window=PUBLISHED_WINDOW * config.frames // 16 if published else None,
        view=View.parse(config.view),
    )

    def open_split(name: str, training: bool, clip: ClipSpec = clip, **options: Any) -> VideoFolder:
        return VideoFolder(
            config.data,
            name,
            clip=clip,
            training=training,
            seed=config.seed,
            decoder=config.decoder,
            samples=parts[name],
            classes=classes,
            color="bgr" if published else "rgb",
            **options,
        )

    measured = None
    if config.mean is not None and config.std is not None:
        mean, std = tuple(config.mean), tuple(config.std)
    elif "mean" in known:
        mean, std = tuple(known["mean"]), tuple(known["std"])
    else:
        say(f"measuring colour statistics of {len(parts['train'])} training videos")
        workers = default_workers() if config.workers is None else config.workers
        # The published statistics are those of every training video, on successive frames.
        measured = open_split("train", False, replace(clip, stride=1) if published else clip)
        limit = None if published else 2000
        mean, std = statistics.measure(measured, limit=limit, workers=workers)
    known = {**known, "mean": mean, "std": std, "frames_per_second": fps}
    if not saved:
        write_json(folder / "data.json", known)
    options: dict[str, Any] = {"mean": mean, "std": std}
    flip = True if published and config.flip is None else config.flip
    reverse = False if published and config.reverse is None else config.reverse
    changes: dict[str, Any] = {"flip": flip, "reverse": reverse, "augment": config.augment}
    train = open_split("train", True, **changes, **options)
    if measured is not None:
        # What could not be read there is reported already.
        train.unreadable.copy_(measured.unreadable)
    say(train.describe())
    if background_index(classes) is not None:
        say("class background: learnt as any other class; `ca3d watch` never reports it")
    return Data(
        train=train,
        val=open_split("val", False, **options) if "val" in parts else None,
        test=open_split("test", False, **options) if "test" in parts else None,
        classes=classes,
        train_labels=train.labels,
        clip=clip,
        mean=mean,  # type: ignore[arg-type]
        std=std,  # type: ignore[arg-type]
        trained_on=info.trained_on or info.name,
        protocol=protocol,
        color=train.color,
        missing=known["missing"],
    )


def _divide(
    config: TrainConfig, say: Callable[[str], None]
) -> tuple[splits.Split, list[str], Protocol]:
    """Returns the parts of the data set, its class names, and the protocol."""
    if config.train_list is not None and config.fold != 1:
        raise UserError(f"--fold {config.fold} is of official splits, not of --train-list")
    if config.train_list is None:
        official = partition(
            config.data, config, val_fraction=config.val_fraction, seed=config.split_seed
        )
        if official is not None:
            if any((config.val_list, config.test_list)):
                raise UserError("--val-list and --test-list need --train-list")
            if config.group is not None:
                raise UserError(f"--group {config.group}: {official.protocol} has its own groups")
            say(official.describe())
            for note in official.notes:
                say(f"  {note}")
            _check(config, official.splits, official.classes)
            return official.splits, official.classes, official.protocol
    parts, name = _splits(config, say)
    classes = sorted({sample.label for part in parts.values() for sample in part})
    _check(config, parts, classes)
    dataset = lists.load_info(config.data).name
    seed = None if name == "lists" else config.split_seed
    return parts, classes, Protocol(name, dataset, seed=seed)


def _keep_lists(
    config: TrainConfig,
    folder: Path,
    parts: splits.Split,
    classes: list[str],
    protocol: Protocol,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the lists of present and of missing videos; returns what is to be known of them."""
    list_folder = folder / "splits"
    list_folder.mkdir(exist_ok=True)
    missing = []
    for name, part in parts.items():
        present = [sample for sample in part if sample.path.is_file()]
        lists.write_list(list_folder / f"{name}.csv", present, config.data)
        missing += [
            {"path": str(s.path), "label": s.label, "split": name}
            for s in part
            if not s.path.is_file()
        ]
        if not present:
            raise UserError(
                f"{config.data}: none of the {len(part)} listed {name} videos is there, for"
                f" example {part[0].path}"
            )
    if missing:
        write_csv(list_folder / "missing.csv", missing)
        total = sum(map(len, parts.values()))
        names = ", ".join(row["path"] for row in missing[:_LISTED])
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        say(
            f"{len(missing)} of {total} listed videos are missing and left out: {names}{more}"
            f" (all: {list_folder / 'missing.csv'})"
        )
    return {
        "protocol": protocol.to_dict(),
        "classes": classes,
        "missing": len(missing),
        "data": str(Path(config.data).absolute()),
    }


def _saved_splits(config: TrainConfig, folder: Path) -> dict[str, list[Sample]]:
    return {
        name: lists.read_list(folder / "splits" / f"{name}.csv", config.data)
        for name in lists.SPLITS
        if (folder / "splits" / f"{name}.csv").is_file()
    }


def _splits(config: TrainConfig, say: Callable[[str], None]) -> tuple[dict[str, list[Sample]], str]:
    """Takes the user's lists, else the data set's own splits, else draws them; says which."""
    name = "lists"
    given = {"train": config.train_list, "val": config.val_list, "test": config.test_list}
    if config.train_list is not None:
        parts = {
            name: lists.load_samples(config.data, list_file=file)[0]
            for name, file in given.items()
            if file is not None
        }
    elif any(given.values()):
        raise UserError("--val-list and --test-list need --train-list")
    else:
        names = lists.splits_of(config.data)
        parts = {name: lists.load_samples(config.data, name)[0] for name in names}
        if parts and "train" not in parts:
            raise UserError(f"{config.data}: has split {', '.join(parts)} but no train split")
    if not parts:
        everything, classes = lists.load_samples(config.data)
        _check_classes(config, classes)
        parts = _draw(config, everything, config.test_fraction)
        grouped = all(sample.group is not None for part in parts.values() for sample in part)
        name = "grouped" if grouped else "random"
        counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        say(f"no split files in {config.data}: drawn with seed {config.split_seed}: {counts}")
    elif "val" not in parts and config.val_fraction > 0:
        drawn = _draw(config, parts["train"], 0.0)
        parts = {**parts, **drawn}
        say(
            f"no validation split: {len(parts['val'])} training videos are kept for it"
            f" (seed {config.split_seed})"
        )
    else:
        defaults = {option.name: option.default for option in fields(config)}
        for option in ("group", "val_fraction", "test_fraction", "split_seed"):
            # Without a validation list, a fraction of 0 is what was asked for, and happens.
            used = option == "val_fraction" and "val" not in parts
            if not used and getattr(config, option) != defaults[option]:
                flag = "--" + option.replace("_", "-")
                say(f"{flag} is not used: nothing is divided at random")
    return parts, name


def _draw(config: TrainConfig, samples: list[Sample], test: float) -> dict[str, list[Sample]]:
    fractions = {"train": 1 - config.val_fraction - test, "val": config.val_fraction, "test": test}
    shares = {name: share for name, share in fractions.items() if share > 0}
    return splits.random_split(samples, shares, config.split_seed, config.group)


def _check(config: TrainConfig, parts: Mapping[str, list[Sample]], classes: list[str]) -> None:
    _check_classes(config, classes)
    if len(parts.get("train", [])) < 2:
        raise UserError(f"{config.data}: fewer than two training videos")
    trained = {sample.label for sample in parts["train"]}
    if missing := [name for name in classes if name not in trained]:
        raise UserError(
            f"{config.data}: the training split has no video of {', '.join(missing[:5])}"
        )
    splits.check_disjoint(parts)


def _check_classes(config: TrainConfig, classes: list[str]) -> None:
    if len(classes) < 2:
        raise UserError(
            f"{config.data}: has only the class {classes[0]!r}; training needs at least two"
        )


def _read_known(folder: Path) -> dict[str, Any]:
    """Reads what a run that was begun knows of its data."""
    file = folder / "data.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _usual_rate(samples: list[Sample], decoder: str) -> float:
    """Returns the median frame rate of some training videos, evenly chosen."""
    step = max(1, len(samples) // PROBED_FILES)
    rates, broken = [], []
    for sample in samples[::step]:
        try:
            with open_video(sample.path, decoder) as video:
                rates.append(video.frames_per_second)
        except VideoError as error:
            broken.append(str(error))
    if not rates:
        raise UserError(f"none of the training videos can be read: {broken[0]}")
    return figures.median_low(rates)
