"""Measuring a trained model on a split."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ca3d.data.split_options import SplitOptions
from ca3d.errors import UserError
from ca3d.files import check_free
from ca3d.options import option

if TYPE_CHECKING:
    from ca3d.data.folder import VideoFolder
    from ca3d.data.samples import Sample
    from ca3d.training.loader import ClipDataset
    from ca3d.training.scoring import Scores
    from ca3d.weights import ModelInfo

_LOG = logging.getLogger("ca3d.data")
#: What `EvalResult.save` writes.
_FILES = ("results.json", "predictions.csv", "confusion.csv", "confusion.png")


@dataclass
class EvalConfig(SplitOptions):
    """Every option of `ca3d eval`; `ca3d eval --help` prints what each of them means.

    Raises:
        ca3d.errors.UserError: From `validate`, naming the option, its value and what is allowed.

    Example:
        >>> EvalConfig("best.safetensors", "videos", clips=0).validate()
        Traceback (most recent call last):
        ca3d.errors.UserError: --clips must be at least 1, not 0
    """

    weights: str = option("", "Weights file (.safetensors) or run folder", "Data", positional=True)
    data: str = option(
        "", "Folder with one sub-folder of videos per class", "Data", positional=True
    )
    split: Literal["train", "val", "test", "all"] = option("test", "Which split", "Data")
    list_file: str | None = option(
        None, "CSV or JSON-lines file of videos (path,label), instead of the split", "Data"
    )
    clips: int = option(1, "Clips per video, evenly over its length", "Views")
    crops: Literal[1, 3] = option(1, "Crops per clip", "Views")
    average: Literal["logits", "softmax"] = option(
        "logits", "What is averaged over clips and crops", "Views"
    )
    untrimmed: bool = option(
        False,
        "DATA holds long videos and annotations.csv (path,label,start,end): find events in them as"
        " `ca3d watch` does",
        "Untrimmed videos",
    )
    step: int = option(4, "Model frames from one recognition to the next", "Untrimmed videos")
    leave: float = option(
        0.7, "Share of its threshold above which an activity goes on", "Untrimmed videos"
    )
    min_duration: float = option(
        0.5, "Seconds that something must last to be an event", "Untrimmed videos"
    )
    out: str | None = option(
        None, "Folder for figures, confusion matrix and predictions", "Results"
    )
    force: bool = option(False, "Replace an earlier evaluation in that folder", "Results")
    json: bool = option(False, "Print the figures as JSON", "Results")
    batch_size: int = option(8, "Videos in a batch", "Run")
    workers: int | None = option(None, "Processes that read videos (0: none)", "Run")
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)", "Run")
    decoder: Literal["auto", "av", "torchcodec"] = option("auto", "Video decoder", "Run")

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        self.validate_split()
        for name in ("clips", "batch_size", "step"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be at least 1, not {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must be at least 0, not {self.workers}")
        if not 0 < self.leave <= 1:
            raise UserError(f"--leave must be above 0 and at most 1, not {self.leave}")
        if not 0 <= self.min_duration < math.inf:
            raise UserError(f"--min-duration must be at least 0, not {self.min_duration}")
        if self.untrimmed:
            self._check_untrimmed()

    def _check_untrimmed(self) -> None:
        """Raises `UserError` for an option that says nothing of long videos."""
        defaults = {option.name: option.default for option in fields(self)}
        own = [option.name for option in fields(SplitOptions)]
        for name in (*own, "list_file", "clips", "crops", "average"):
            if getattr(self, name) != defaults[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, name)} has no meaning with --untrimmed")


@dataclass
class EvalResult:
    """Figures of a model on a split.

    Args:
        summary: top1, top5, mean_class (shares of 1), loss, videos, broken (messages).
        classes: Class names.
        confusion: (classes, classes) counts of [true, predicted].
        predictions: One row a video: path, label, predicted, probability.
        per_class: Accuracy of each class; NaN without samples.
        settings: What was evaluated and how.

    Example:
        >>> summary = {"top1": 0.5, "videos": 2}
        >>> EvalResult(summary, ["run"], None, [], [0.5]).to_dict()["per_class"]
        {'run': 0.5}
    """

    summary: dict[str, Any]
    classes: list[str]
    confusion: Any
    predictions: list[dict[str, Any]]
    per_class: list[float]
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_scores(cls, scores: Scores, dataset: ClipDataset, **settings: Any) -> EvalResult:
        """Puts names to scores.

        Args:
            scores: What `ca3d.training.scoring.score` returned for `dataset`.
            dataset: Knows samples and classes.
            **settings: Stored with the figures.
        """
        best = scores.probabilities.max(1)
        classes = list(dataset.classes)
        predictions = [
            {
                "path": str(dataset.samples[index].path),
                "label": classes[label],
                "predicted": classes[predicted] if math.isfinite(probability) else "",
                "probability": round(probability, 6),
            }
            for index, label, predicted, probability in zip(
                scores.indices.tolist(),
                scores.labels.tolist(),
                best.indices.tolist(),
                best.values.tolist(),
                strict=True,
            )
        ]
        return cls(
            summary=scores.summary(),
            classes=classes,
            confusion=scores.metrics.confusion,
            predictions=predictions,
            per_class=scores.metrics.per_class.tolist(),
            settings=settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as plain values for JSON."""
        return {
            **self.settings,
            **self.summary,
            "per_class": dict(zip(self.classes, self.per_class, strict=True)),
        }

    def save(self, folder: str | Path) -> None:
        """Writes results.json, predictions.csv, confusion.csv and confusion.png.

        Args:
            folder: Where to; made when missing.

        Raises:
            ca3d.errors.UserError: The folder can't be written to.
        """
        from ca3d.training import plots
        from ca3d.training.logs import write_csv, write_json

        folder = results_folder(folder)
        write_json(folder / "results.json", self.to_dict())
        if self.predictions:
            write_csv(folder / "predictions.csv", self.predictions)
        rows = [
            {"true": name, **dict(zip(self.classes, counts, strict=True))}
            for name, counts in zip(self.classes, self.confusion.tolist(), strict=True)
        ]
        write_csv(folder / "confusion.csv", rows)
        title = f"top-1 {100 * self.summary['top1']:.1f} % of {self.summary['videos']} videos"
        plots.plot_confusion(self.confusion, self.classes, folder / "confusion.png", title)


def evaluate(config: EvalConfig) -> EvalResult:
    """Classifies every video of a split and counts.

    Processes that torchrun started share the videos; each is classified once.

    Args:
        config: The options; see `EvalConfig`.

    Returns:
        The figures; also saved when `config.out` is set.

    Raises:
        ca3d.errors.UserError: The weights or data can't be used, none of the videos be read, or
            `config.out` not be written to or only with `config.force`.

    Example:
        >>> evaluate(EvalConfig("missing.safetensors", "videos"))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    from ca3d.training.distributed import is_first

    if config.out is not None:
        results_folder(config.out, _FILES, force=config.force)
    scored = score_split(config)
    result = EvalResult.of_scores(
        scored.scores,
        scored.dataset,
        weights=str(weights_file(config.weights)),
        data=config.data,
        split=config.list_file or config.split,
        clips=config.clips,
        crops=config.crops,
        average=config.average,
        model=scored.info.model,
        precision=scored.info.precision,
        protocol=scored.protocol,
        missing=len(scored.dataset.missing),
    )
    if config.out is not None and is_first():
        result.save(config.out)
    return result


class ScoredSplit(NamedTuple):
    """What a model says of every video of a split.

    Attributes:
        scores: Of each video that could be read.
        dataset: Knows the files and their classes.
        info: What the weights file says of the model.
        protocol: The protocol that chose the videos, or None.
    """

    scores: Scores
    dataset: VideoFolder
    info: ModelInfo
    protocol: dict[str, Any] | None


def score_split(config: EvalConfig) -> ScoredSplit:
    """Classifies every video of a split.

    Args:
        config: The options; see `EvalConfig`.

    Returns:
        Scores, data set, model and protocol.

    Raises:
        ca3d.errors.UserError: The weights or data can't be used, or none of the videos be read.

    Example:
        >>> score_split(EvalConfig("missing.safetensors", "videos"))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    from ca3d import precision, weights
    from ca3d.data.folder import VideoFolder
    from ca3d.predict import check_complete, clip_spec
    from ca3d.training.device import choose_device
    from ca3d.training.distributed import connect
    from ca3d.training.loader import default_workers
    from ca3d.training.scoring import merge, score

    config.validate()
    file = weights_file(config.weights)
    device = choose_device(config.device)
    model, info = weights.load(file, device=str(device))
    check_complete(info)
    samples, protocol = (None, None) if config.list_file else _protocol_samples(config, info)
    if samples is None and not config.list_file:
        samples = _own_samples(config, file.parent)
    dataset = VideoFolder(
        config.data,
        None if config.split == "all" or config.list_file else config.split,
        clip=clip_spec(info),
        training=False,
        clips=config.clips,
        crops=config.crops,
        mean=info.mean,
        std=info.std,
        decoder=config.decoder,
        list_file=config.list_file,
        samples=samples,
        classes=list(info.classes),
        color=info.color,
    )
    if not len(dataset):
        raise UserError(f"{config.data}: no videos in split {config.split!r}")
    if config.split in ("val", "test"):
        _warn_of_trained(dataset, file.parent, config.data)
    regime = precision.for_inference(info.precision)
    with connect(device) as world:
        own = score(
            regime.prepare(model),
            regime,
            dataset,
            len(info.classes),
            places=world.share(range(len(dataset))),
            batch_size=config.batch_size,
            workers=default_workers() if config.workers is None else config.workers,
            device=device,
            average=config.average,
        )
        scores = merge(world.gather(own))
    if not scores.metrics.count:
        raise UserError(f"{config.data}: none of the {len(dataset)} videos could be read")
    return ScoredSplit(scores, dataset, info, protocol)


def _protocol_samples(
    config: EvalConfig, info: ModelInfo
) -> tuple[list[Sample] | None, dict[str, Any] | None]:
    """Returns the videos of a split by a protocol (None: the folder's own), and the protocol.

    The split is the one that the model was trained on: of another one, training videos would be
    tested on.
    """
    from dataclasses import replace

    from ca3d.data.benchmarks import Protocol, partition
    from ca3d.data.benchmarks.partition import VAL_FRACTION

    trained = info.extra.get("protocol")
    trained = Protocol(**trained) if trained else None
    asked: SplitOptions = config
    if trained is not None and trained.fold is not None and config.fold == 1:
        asked = replace(config, fold=trained.fold)
    if trained is not None and trained.name == "published":
        asked = replace(asked, protocol="published")
    given = partition(
        config.data,
        asked,
        val_fraction=(trained.val_fraction if trained else None) or VAL_FRACTION,
        seed=(trained.seed if trained and trained.name == "official" else None) or 0,
    )
    if given is None:
        return None, trained.to_dict() if trained is not None else None
    same = trained is None or trained.dataset != given.protocol.dataset
    if not same and trained != given.protocol:
        raise UserError(
            f"{config.weights} was trained on {trained}; by {given.protocol} it would be tested on"
            " videos that it was trained on"
        )
    if config.split == "all":
        chosen = [s for part in given.splits.values() for s in part]
    elif config.split in given.splits:
        chosen = given.splits[config.split]
    else:
        raise UserError(f"--split {config.split}: {given.protocol} has no such part")
    return chosen, given.protocol.to_dict()


def _own_samples(config: EvalConfig, run: Path) -> list[Sample] | None:
    """The videos of a split that a run drew itself, where the data set has no such split."""
    from ca3d.data import samples as lists

    drawn = run / "splits" / f"{config.split}.csv"
    if config.split == "all" or not drawn.is_file() or config.split in lists.splits_of(config.data):
        return None
    samples = lists.read_list(drawn, config.data)
    if not all(sample.path.is_file() for sample in samples):
        return None  # the run was trained on other data
    _LOG.warning("%s has no split %s: taking that of the run, %s", config.data, config.split, drawn)
    return samples


def _warn_of_trained(dataset: VideoFolder, run: Path, data: str) -> None:
    """Says how many of the videos trained the model, where its run is at hand."""
    from ca3d.data import samples as lists

    trained = run / "splits" / "train.csv"
    if not trained.is_file():
        return
    known = {sample.path.resolve() for sample in lists.read_list(trained, data)}
    count = sum(sample.path.resolve() in known for sample in dataset.samples)
    if count:
        _LOG.warning(
            "%d of these %d videos trained the model (%s): the figures flatter it",
            count,
            len(dataset),
            trained,
        )


def weights_file(path: str | Path) -> Path:
    """Returns a weights file; for a run folder its best one.

    Args:
        path: A file, or the folder of a run.

    Raises:
        ca3d.errors.UserError: There is no such file, or no weights in the folder.

    Example:
        >>> weights_file("missing.safetensors")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    path = Path(path)
    if path.is_dir():
        best = path / "best.safetensors"
        if not best.is_file():
            raise UserError(f"{path}: no best.safetensors in this folder")
        return best
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def results_folder(path: str | Path, files: Iterable[str] = (), force: bool = False) -> Path:
    """Makes a folder for results where there is none.

    Args:
        path: The folder.
        files: Names of what is going to be written into it.
        force: Whether files of these names may be replaced.

    Raises:
        ca3d.errors.UserError: The folder can't be made, or holds one of the files.

    Example:
        >>> results_folder("/dev/null/results")
        Traceback (most recent call last):
        ca3d.errors.UserError: cannot use /dev/null/results for the results: Not a directory
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {path} for the results: {error.strerror}") from error
    check_free(*(path / name for name in files), force=force, flag="--out")
    return path
