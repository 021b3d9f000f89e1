"""`ca3d demo`: from nothing to a trained model and a report, without any download."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca3d.errors import UserError
from ca3d.options import option

DATA_SET = "mocap30"


@dataclass
class DemoConfig:
    """Every option of `ca3d demo`.

    Example:
        >>> DemoConfig().out
        'demo'
    """

    out: str = option("demo", "Folder for videos, model and report")
    quick: bool = option(
        False, "Few videos and few steps: shows that everything runs, not how well it can learn"
    )
    clutter: float = option(
        0.0, "Distractors in the videos, from 0 (a plain room) to 1 (everywhere): far harder"
    )
    seed: int = option(0, "Seed of videos and training")
    workers: int = option(2, "Processes that render and read videos")


def run(config: DemoConfig) -> Path:
    """Makes videos, trains, tests, predicts, and writes a report; finished stages are reused.

    Args:
        config: The options.

    Returns:
        The report, a Markdown file with pictures beside it.

    Raises:
        ca3d.errors.UserError: A folder can't be used.
        ca3d.training.interrupt.StoppedError: SIGINT or SIGTERM came; a second run goes on.

    Example:
        >>> run(DemoConfig(workers=0))
        Traceback (most recent call last):
        ca3d.errors.UserError: --workers must be at least 1, not 0
    """
    if config.workers < 1:
        raise UserError(f"--workers must be at least 1, not {config.workers}")
    if config.seed < 0:
        raise UserError(f"--seed must not be negative, not {config.seed}")
    if not 0 <= config.clutter <= 1:
        raise UserError(f"--clutter must be from 0 to 1, not {config.clutter}")
    out = Path(config.out)
    begin = time.monotonic()
    times = _Times(out)
    print(f"ca3d demo -> {out}/   (Ctrl-C is safe: run it again and it goes on)\n")

    print("1/4  videos")
    data = times.take("videos", lambda: _make_videos(config, out))
    print("\n2/4  training")
    result = times.take("training", lambda: _train(config, data, out))
    print("\n3/4  recognising unseen videos")
    figures = times.take("recognition", lambda: _recognise(config, data, out, result.folder))
    print("\n4/4  report")
    report = _write_report(config, out, data, figures, times)
    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    print(f"     {report}  (look at it; done in {minutes}:{seconds:02d} min)\n")
    print(_closing_lines())
    return report


def _make_videos(config: DemoConfig, out: Path) -> Path:
    from ca3d.cli.output import Bar
    from ca3d.data import cache, embedded

    folder = out / "videos" / f"{DATA_SET}{_suffix(config)}"
    print(f"     {embedded.describe(DATA_SET)}")
    if (folder / "dataset.json").is_file():
        print(f"     already there: {folder}")
    else:
        with Bar("     rendering") as bar:
            embedded.make(
                DATA_SET,
                folder,
                size={"train": 60, "val": 30, "test": 30} if config.quick else "default",
                clutter=config.clutter,
                seed=config.seed,
                workers=config.workers,
                progress=bar.update,
            )
        print(f"     made: {folder}")
    # Training would decode every video again in every epoch, on the cores that it computes on.
    with Bar("     decoding") as bar:
        frames = cache.build(
            folder,
            short_side=_RECIPE["size"],
            format="npy",
            workers=config.workers,
            progress=bar.update,
        )
    print(f"     frames for training: {frames.folder} ({frames.bytes / 1e6:.0f} MB)")
    return folder


def _suffix(config: DemoConfig) -> str:
    """Ends the names of what other options would make otherwise."""
    clutter = f"-clutter-{config.clutter:g}" if config.clutter else ""
    return f"{clutter}-quick" if config.quick else clutter


def _train(config: DemoConfig, data: Path, out: Path) -> Any:
    from ca3d.training import TrainConfig, train

    options: dict[str, Any] = {"epochs": 13, "warmup_epochs": 1.2}
    if config.quick:
        options = {"epochs": 2, "batch_size": 16}
    return train(
        TrainConfig(
            data=str(data),
            out=str(out / f"run{_suffix(config)}"),
            **{**_RECIPE, **options},
            seed=config.seed,
            workers=config.workers,
            resume="auto",
        )
    )


# A shallow model and a short, high cycle: what learns fastest on a CPU.
_RECIPE: dict[str, Any] = {
    "model": "ca3d_tiny",
    "model_options": {
        "spatial_depths": [1, 1, 1, 1],
        "temporal_depths": [0, 0, 1, 1],
        "dropout": 0.0,
    },
    "size": 32,
    "augment": "none",
    "batch_size": 32,
    "optimizer": "adamw",
    "schedule": "onecycle",
    "lr": 6e-3,
    "weight_decay": 0.01,
    "checkpoint_steps": 100,
}


def _recognise(config: DemoConfig, data: Path, out: Path, folder: Path) -> dict[str, Any]:
    """Draws the pictures of the report and returns the figures in it."""
    import ca3d
    from ca3d import weights
    from ca3d.report.sheet import Strip, draw_contact_sheet
    from ca3d.report.timeline import draw_timeline

    results = json.loads((folder / "test" / "results.json").read_text())
    with (folder / "test" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        first.setdefault(row["label"], row)
    strips = [
        Strip(Path(row["path"]), row["label"], row["predicted"], float(row["probability"]))
        for _, row in sorted(first.items())
    ]
    right = sum(strip.right for strip in strips)
    draw_contact_sheet(
        strips,
        out / "contact_sheet.png",
        title=f"The first test video of every class, seen from unseen sides: {right} of"
        f" {len(strips)} recognised",
    )
    for name in ("curves.png", "test/confusion.png"):
        shutil.copyfile(folder / name, out / Path(name).name)
    parts = [strips[place] for place in _FILM]
    film, ends = _join_videos([part.path for part in parts], out / "film.avi")
    predictor = ca3d.load(folder, device="cpu")
    # The predictor's model is fused, and has other parameters.
    trained, _ = weights.load(folder / "best.safetensors")
    truth = [
        (begin, end, part.label)
        for begin, end, part in zip([0.0, *ends], ends, parts, strict=False)
    ]
    prediction = predictor.predict(film, overlap=0.75)
    draw_timeline(prediction, out / "timeline.png", frames=15, truth=truth)
    base = [(_base(row["label"]), _base(row["predicted"])) for row in rows]
    same_action = [row for row, (a, b) in zip(rows, base, strict=True) if a == b]
    return {
        "top1": results["top1"],
        "top5": results["top5"],
        "videos": results["videos"],
        "action": len(same_action) / len(rows),
        "direction": (
            sum(row["label"] == row["predicted"] for row in same_action) / len(same_action)
            if same_action
            else float("nan")
        ),
        "shuffled": _accuracy_of_shuffled(config, data, folder),
        "film": [part.label for part in parts],
        "parameters": sum(p.numel() for p in trained.parameters()),
        "sheet_right": right,
        "sheet_all": len(strips),
    }


# Places, among the 30 sorted classes, of the videos that are joined to a longer one.
_FILM = (2, 16, 28)


def _base(label: str) -> str:
    return label.removesuffix("-reversed")


def _accuracy_of_shuffled(config: DemoConfig, data: Path, folder: Path) -> float:
    """Returns the accuracy when the frames of every test clip come in a random order."""
    import torch

    from ca3d import precision, weights
    from ca3d.data.folder import VideoFolder
    from ca3d.predict import clip_spec
    from ca3d.training.scoring import score

    model, info = weights.load(folder / "best.safetensors")

    class Shuffled(VideoFolder):
        def __getitem__(self, index: int) -> Any:
            item = super().__getitem__(index)
            if item is None:
                return None
            generator = torch.Generator().manual_seed(index)
            order = torch.randperm(item[0].shape[1], generator=generator)
            return (item[0][:, order], *item[1:])

    dataset = Shuffled(
        data,
        "test",
        clip=clip_spec(info),
        training=False,
        mean=info.mean,
        std=info.std,
        classes=list(info.classes),
    )
    regime = precision.for_inference(info.precision)
    scores = score(model, regime, dataset, len(info.classes), batch_size=20, workers=config.workers)
    return scores.metrics.top1


def _join_videos(paths: list[Path], target: Path) -> tuple[Path, list[float]]:
    """Writes one video after the other into a longer one; returns where each ends, in seconds."""
    import torch

    from ca3d.data.embedded.encode import write_video
    from ca3d.data.reader import open_video

    parts, ends = [], []
    rate, count = 0.0, 0
    for path in paths:
        with open_video(path) as video:
            rate = video.frames_per_second
            parts.append(video.frames(range(video.num_frames)))
        count += len(parts[-1])
        ends.append(count / rate)
    frames = torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    write_video(temporary, frames, round(rate), "mpeg4")
    temporary.replace(target)
    return target, ends


class _Times:
    """Seconds that each stage took, remembered over interruptions."""

    def __init__(self, out: Path) -> None:
        self.file = out / "times.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {out}: {error.strerror}") from error
        self.seconds: dict[str, float] = {}
        if self.file.is_file():
            self.seconds = json.loads(self.file.read_text())

    def take(self, stage: str, work: Callable[[], Any]) -> Any:
        """Runs a stage and adds its time to what it took before."""
        from ca3d.training.logs import write_json

        begin = time.monotonic()
        try:
            return work()
        finally:
            taken = time.monotonic() - begin
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + taken, 1)
            write_json(self.file, self.seconds)


def _write_report(
    config: DemoConfig, out: Path, data: Path, figures: dict[str, Any], times: _Times
) -> Path:
    from ca3d.data import embedded
    from ca3d.training.checkpoint import write_file
    from ca3d.training.run_folder import environment

    machine = environment()

    def percent(key: str) -> str:
        return f"{100 * figures[key]:.1f} %"

    quick = (
        "\n> This was `--quick`: a few videos and a few steps, to show that everything runs."
        " The figures below say nothing about what the model can learn.\n"
        if config.quick
        else ""
    )
    clutter = (
        f" Distractors move through the room (`--clutter {config.clutter:g}`)."
        if config.clutter
        else ""
    )
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in times.seconds.items())
    text = f"""# What a small CA3D learned
{quick}
A CA3D of {figures["parameters"]:,} parameters was trained on video files on this machine. Then
it was shown {figures["videos"]} videos that it had never seen, from directions it had never seen.

| on the test split | |
|---|---:|
| right class of 30 (top-1) | **{percent("top1")}** |
| right class among the first five | {percent("top5")} |
| right action, whether forwards or backwards | {percent("action")} |
| where the action is right: right direction of time | {percent("direction")} |
| the same videos with their frames in random order | {percent("shuffled")} |
| guessing | 3.3 % |

Each of 15 actions is played forwards in one class and backwards in another: whoever looks at single
frames, or at frames without their order, can't get beyond 50 %.

**What this is, and is not.** {DATA_SET} is made of {embedded.describe(DATA_SET)}.{clutter}

## Unseen videos

The first test video of every class, not a selection: {figures["sheet_right"]} of
{figures["sheet_all"]} recognised. Left as recorded, right played backwards.

![contact sheet](contact_sheet.png)

## Over time

Test videos joined to a longer one (*{"*, *".join(figures["film"])}*), recognised by `ca3d predict`
in overlapping windows of two seconds. At the joints a window sees two actions.

![frames above the timeline of labels](timeline.png)

## Training

![loss, accuracy and learning rate](curves.png)

## What is taken for what

![confusion matrix of the test split](confusion.png)

## How it was made

{machine["cores"]} cores ({machine["cpu"]}), torch {machine["packages"]["torch"]}; {seconds}.
Everything is in this folder: the videos in `{data.relative_to(out)}`; the model, its metrics and
its exact options in `run{_suffix(config)}`.

## Your own videos

One folder per activity, `my_videos/ACTIVITY/*.mp4`, then:

```sh
{_closing_commands()}
```
"""
    report = out / "report.md"
    write_file(report, text)
    return report


def _closing_commands() -> str:
    program = "ca3d"
    if shutil.which("ca3d") is None:
        beside = Path(sys.executable).with_name("ca3d")
        if beside.exists():
            near = beside.is_relative_to(Path.cwd())
            program = str(beside.relative_to(Path.cwd()) if near else beside)
        else:
            program = f"{sys.executable} -m ca3d"
    return "\n".join(
        (
            f"{program} data check my_videos",
            f"{program} train my_videos --out runs/mine",
            f"{program} predict new.mp4 --weights runs/mine",
        )
    )


def _closing_lines() -> str:
    return (
        "Now your own videos, one folder per activity (my_videos/ACTIVITY/*.mp4):\n\n"
        + "\n".join("  " + line for line in _closing_commands().splitlines())
    )
