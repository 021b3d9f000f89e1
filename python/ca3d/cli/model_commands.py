"""What the commands about models do: training, measuring, using, converting."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca3d.cli.output import as_json, log_warnings
from ca3d.errors import UserError
from ca3d.files import check_free

if TYPE_CHECKING:
    from ca3d.cli.options import ConvertConfig, PredictConfig
    from ca3d.evaluate import EvalConfig
    from ca3d.export.options import ExportConfig
    from ca3d.predict import Prediction
    from ca3d.results import ResultsConfig
    from ca3d.training.config import TrainConfig
    from ca3d.watch.calibrate import CalibrateConfig
    from ca3d.watch.options import WatchConfig


def train(config: TrainConfig) -> None:
    """Trains, and says where the results are.

    Args:
        config: The options.
    """
    from ca3d.training.distributed import is_first
    from ca3d.training.loop import train as run

    log_warnings()
    if not config.out:
        split = f"-split{config.fold}" if config.fold != 1 else ""
        split = f"{split}-published" if config.protocol == "published" else split
        config = dataclasses.replace(
            config, out=f"runs/{Path(config.data).absolute().name}-{config.model}{split}"
        )
    result = run(config)
    if not is_first():
        return
    print(f"\nrun folder: {result.folder}")
    if result.best_accuracy == result.best_accuracy:
        print(
            f"best epoch: {result.best_epoch + 1}"
            f" (validation top-1 {100 * result.best_accuracy:.1f} %)"
        )
    if result.skipped:
        print(f"skipped steps (loss or gradient not finite): {result.skipped}")
    if result.missing or result.unreadable:
        print(
            f"left out: {result.missing} missing and {result.unreadable} unreadable videos, listed"
            f" in {result.folder / 'splits'}"
        )
    if result.test is not None:
        _print_summary(result.test, "test split, read once, best epoch")
    file = shlex.quote(str(result.folder / "best.safetensors"))
    print(f"use it: ca3d predict VIDEO --weights {file}")


def evaluate(config: EvalConfig) -> None:
    """Evaluates, and prints the figures.

    Args:
        config: The options.
    """
    from ca3d.evaluate import evaluate as run
    from ca3d.training.distributed import is_first

    log_warnings()
    if config.untrimmed:
        _evaluate_untrimmed(config)
        return
    result = run(config)
    if not is_first():
        return
    if config.json:
        print(as_json(result.to_dict()))
        return
    views = f"{config.clips} clips x {config.crops} crops"
    _print_summary(result.summary, f"{config.data}, split {result.settings['split']}, {views}")
    for message in result.summary["broken"]:
        print(f"left out: {message}", file=sys.stderr)
    if config.out is not None:
        print(f"figures, predictions and confusion matrix: {config.out}")


def _evaluate_untrimmed(config: EvalConfig) -> None:
    from ca3d.watch.untrimmed import evaluate_untrimmed

    result = evaluate_untrimmed(config)
    print(as_json(result.to_dict()) if config.json else result)
    for message in result.broken:
        print(f"left out: {message}", file=sys.stderr)
    if config.out is not None:
        print(f"figures and events: {config.out}", file=sys.stderr)


def results(config: ResultsConfig) -> None:
    """Prints a table of test figures.

    Args:
        config: The options.
    """
    from ca3d import results as tables
    from ca3d.training.logs import as_csv

    rows = tables.table([tables.read(run) for run in config.runs])
    if config.format == "json":
        print(as_json(rows))
    elif config.format == "csv":
        print(as_csv(rows), end="")
    else:
        print(tables.as_markdown(rows))


def predict(config: PredictConfig) -> int:
    """Predicts on a video or on all videos of a folder.

    Args:
        config: The options.

    Returns:
        0, or 1 when no video could be read.
    """
    from ca3d.predict import Predictor, find_videos

    for name, fine, allowed in (
        ("top_k", config.top_k >= 1, "at least 1"),
        ("batch_size", config.batch_size >= 1, "at least 1"),
        ("overlap", 0 <= config.overlap < 1, "in [0, 1)"),
    ):
        if not fine:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {allowed}, not {getattr(config, name)}")
    videos = find_videos(config.path)
    predictor = Predictor.from_file(
        config.weights, None if config.device == "auto" else config.device, config.runtime
    )
    single = not Path(config.path).is_dir()
    pictures = _picture_paths(config, videos, single)
    check_free(*pictures.values(), force=config.force, flag="--picture")
    found: list[Prediction] = []
    for video in videos:
        try:
            prediction = predictor.predict(
                video,
                top_k=config.top_k,
                overlap=config.overlap,
                batch_size=config.batch_size,
                decoder=config.decoder,
            )
        except UserError as error:
            if single:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        found.append(prediction)
        if video in pictures:
            prediction.save_picture(pictures[video])
        if not config.json:
            _print_prediction(prediction, windows=config.windows or single)
    if config.json:
        content = [prediction.to_dict() for prediction in found]
        print(as_json(content[0] if single else content))
    if not found:
        raise UserError(f"{config.path}: none of the {len(videos)} videos could be read")
    return 0


def watch(config: WatchConfig) -> None:
    """Watches a camera or a file.

    Args:
        config: The options.
    """
    from ca3d.watch.run import watch as run

    run(config)


def calibrate(config: CalibrateConfig) -> None:
    """Calibrates a model, and prints what was measured.

    Args:
        config: The options.
    """
    from ca3d.watch.calibrate import calibrate as run

    log_warnings()
    print(run(config))


def convert(config: ConvertConfig) -> None:
    """Converts published weights.

    Args:
        config: The options.
    """
    from ca3d.convert import convert as run

    if not Path(config.input).is_file():
        raise UserError(f"{config.input}: no such file")
    if not config.out.endswith(".safetensors"):
        raise UserError(f"--out must end in .safetensors, not {config.out!r}")
    check_free(config.out, force=config.force, flag="--out")
    info = run(
        config.input,
        config.out,
        classes=_class_names(config.classes),
        color=config.color,
        mean=_three(config.mean, "--mean"),
        std=_three(config.std, "--std"),
        model=config.model,
        frames=config.frames,
        stride=config.stride,
        frames_per_second=config.fps,
        size=config.size,
        resize=config.resize,
        precision=config.precision,
        trained_on=config.trained_on,
    )
    print(f"{config.out}: {info.model}, {info.options['num_classes']} classes, {info.color}")
    missing = [
        flag
        for flag, value in (
            ("--classes", info.classes),
            ("--mean", info.mean),
            ("--std", info.std),
        )
        if not value
    ]
    if missing:
        print(f"not known: {', '.join(missing)}; `ca3d predict` and `eval` need them")


def export(config: ExportConfig) -> None:
    """Exports a model, and prints how the files compare with it.

    Args:
        config: The options.
    """
    from ca3d.export.run import export as run

    result = run(config, lambda line: print(line, file=sys.stderr))
    if config.json:
        print(as_json(result.to_dict()))
        return
    for comparison in result.comparisons:
        print(comparison)
    if result.accuracy is not None:
        print(result.accuracy)
    print(f"{result.folder}: {config.format}, {config.precision}")


def _print_summary(summary: dict[str, Any], title: str) -> None:
    print(f"{title}: {summary['videos']} videos")
    for key, name in (("top1", "top-1"), ("top5", "top-5"), ("mean_class", "mean class")):
        print(f"  {name:<11}{100 * summary[key]:6.2f} %")
    if summary["broken"]:
        print(f"  {len(summary['broken'])} videos could not be read and are not counted")
    if summary["unscored"]:
        print(f"  {summary['unscored']} videos got scores of NaN or infinity and count as wrong")


def _print_prediction(prediction: Prediction, windows: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A path or a class may look like Rich's markup: clip [a1].mp4.
    title = Text(f"{prediction.path}  ({prediction.duration:.1f} s)", style="table.title")
    table = Table(title=title, title_justify="left")
    table.add_column("seconds", justify="right")
    for number in range(len(prediction.labels)):
        table.add_column(f"{number + 1}.")
    rows = [("all", prediction.labels)]
    if windows and len(prediction.windows) > 1:
        rows += [(f"{w.start:.1f} - {w.end:.1f}", w.labels) for w in prediction.windows]
    for place, (when, labels) in enumerate(rows):
        cells = [Text(f"{label.name} {100 * label.probability:.0f} %") for label in labels]
        table.add_row(when, *cells, end_section=place == 0)
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(table)


def _picture_paths(config: PredictConfig, videos: list[Path], single: bool) -> dict[Path, Path]:
    """Where the picture of each video goes; makes the folders."""
    if config.picture is None:
        return {}
    if single:
        return {videos[0]: Path(config.picture)}
    stems = Counter(video.with_suffix("") for video in videos)
    pictures = {}
    for video in videos:
        # Of a.avi and a.mp4 both become a picture.
        name = f"{video.name}.png" if stems[video.with_suffix("")] > 1 else f"{video.stem}.png"
        picture = Path(config.picture) / video.relative_to(config.path).with_name(name)
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {picture.parent}: {error.strerror}") from error
        pictures[video] = picture
    return pictures


def _class_names(value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    if os.path.isfile(value):  # a long list of names is no path, and no error here
        try:
            lines = Path(value).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {value}: cannot be read as UTF-8 text: {error}") from error
        return tuple(line.strip() for line in lines if line.strip())
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if len(names) < 2:
        raise UserError(f"--classes {value}: neither a file nor names separated by commas")
    return names


def _three(values: list[float] | None, flag: str) -> tuple[float, float, float] | None:
    if values is None:
        return None
    if len(values) != 3:
        raise UserError(f"{flag} must be three numbers, not {values}")
    return values[0], values[1], values[2]
