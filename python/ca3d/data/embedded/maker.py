"""Makes a data set as a folder of video files with split files."""

import csv
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ca3d.data.embedded.encode import check_codec, pad_file
from ca3d.data.embedded.intervals import SPLITS, YAW
from ca3d.data.embedded.recipe import DESCRIPTIONS, UNTRIMMED, Recipe
from ca3d.data.embedded.worker import Job, run, to_json
from ca3d.errors import UserError

MADE_BY = "ca3d data make"
Progress = Callable[[int, int], None]
DEFAULT_FRAMES = {"mocap15": 40, "mocap30": 40, "motion-order": 16}
LONGEST_UNTRIMMED = 36000
UNTRIMMED_SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"val": 1, "test": 2},
    "default": {"val": 4, "test": 12},
    "large": {"val": 12, "test": 48},
}

# size -> clips of each split, rounded up to as many of every class
SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"train": 240, "val": 60, "test": 120},
    "default": {"train": 2700, "val": 240, "test": 480},
    "large": {"train": 12000, "val": 600, "test": 1800},
}


def names() -> list[str]:
    """Names of the data sets.

    Example:
        >>> names()[:2]
        ['mocap15', 'mocap30']
    """
    return list(DESCRIPTIONS)


def describe(name: str) -> str:
    """What a data set is, and what it does not measure.

    Args:
        name: one of `names()`.

    Returns:
        One sentence.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> describe("mocap15")[:17]
        '15 human actions;'
    """
    if name not in DESCRIPTIONS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(map(repr, names()))}")
    return DESCRIPTIONS[name]


def make(
    name: str,
    out_dir: str | Path,
    *,
    size: str | Mapping[str, int] = "default",
    clutter: float = 0.0,
    codec: str = "mpeg4",
    seed: int = 0,
    workers: int = 2,
    progress: Progress | None = None,
    resolution: int = 64,
    frames: int | None = None,
    frames_per_second: int = 16,
    segments: int = 2,
    views: str = "side",
    background: bool = False,
    force: bool = False,
) -> Path:
    """Makes a data set: class folders with videos, split files, `dataset.json`, `clips.csv`.

    The untrimmed sets have no classes of clips but a folder per split, `val` and `test`, and
    `annotations.csv` (path, label, start, end in seconds) of the actions in them.

    All files have the same length, codec and number of bytes. The clip with a given seed, split and
    index is the same for any number of workers. The folder appears when it is complete.

    Args:
        name: one of `names()`.
        out_dir: folder to make.
        size: `"small"`, `"default"`, `"large"`, or clips of each split in all, for example
            `{"train": 300, "val": 30, "test": 60}`; classes take turns.
        clutter: 0 (a plain room) to 1 (moving and resting distractors everywhere).
        codec: `"mpeg4"` (.avi) or `"h264"` (.mp4).
        seed: another seed gives other clips.
        workers: processes; 1 works in this one.
        progress: called with the number of finished clips and of all clips.
        resolution: side of the frames in pixels, even, 32 to 512.
        frames: frames of a clip; None for 40 (`motion-order`: 16; untrimmed: five minutes, one
            for `"small"`).
        frames_per_second: rate of the files, 4 to 60.
        segments: motions in a row in `motion-order`, 2 or 3.
        views: where the camera of the mocap sets stands: `"side"` within 60 degrees of the
            performer's right side, `"all"` anywhere around (much harder).
        background: add the class `background` to a mocap set: an empty room, or somebody who
            stands still.
        force: replace a data set that this function made before.

    Returns:
        `out_dir` as a path.

    Raises:
        ValueError: names the argument that is out of range.
        ca3d.errors.UserError: if the folder exists or can't be written.

    Example:
        >>> folder = Path(tempfile.mkdtemp()) / "demo"
        >>> clips = {"train": 15, "val": 0, "test": 0}
        >>> make("mocap15", folder, size=clips, workers=1, frames=4, resolution=32).name
        'demo'
        >>> sum(1 for file in folder.glob("*/*.avi"))
        15
    """
    describe(name)
    untrimmed = name.endswith(UNTRIMMED)
    _whole("frames_per_second", frames_per_second, 4, 60)
    if frames is None:
        minutes = 1 if size == "small" else 5
        frames = 60 * minutes * frames_per_second if untrimmed else DEFAULT_FRAMES[name]
    recipe = Recipe(
        name=name,
        size=_whole("resolution", resolution, 32, 512),
        frames=_whole("frames", frames, 2, LONGEST_UNTRIMMED if untrimmed else 1024),
        frames_per_second=frames_per_second,
        clutter=clutter,
        seed=_whole("seed", seed, 0, 2**31 - 1),
        segments=_whole("segments", segments, 2, 3),
        views=views,
        background=background,
    )
    if background and (untrimmed or not name.startswith("mocap")):
        raise ValueError(f"background is for the mocap sets, not for {name!r}")
    if segments != 2 and not name.startswith("motion-order"):
        raise ValueError(f"segments is for motion-order, not for {name!r}")
    if views not in YAW:
        raise ValueError(f"views is {views!r}, expected one of {', '.join(map(repr, YAW))}")
    if views != "side" and not name.startswith("mocap"):
        raise ValueError(f"views is for the mocap sets, not for {name!r}")
    if recipe.frames < recipe.least_frames:
        raise ValueError(f"frames is {frames}, expected at least {recipe.least_frames}")
    if resolution % 2:
        raise ValueError(f"resolution is {resolution}, expected an even number")
    if not 0.0 <= clutter <= 1.0:
        raise ValueError(f"clutter is {clutter}, expected a number from 0 to 1")
    check_codec(codec)
    _whole("workers", workers, 1, 256)
    clips = _untrimmed_clips(size) if untrimmed else _clips(size, len(recipe.classes))
    out = Path(out_dir)
    _check_free(out, force)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        rows = _make_clips(recipe, codec, clips, temporary, workers, progress)
        _equalise(temporary, rows)
        _write_tables(recipe, codec, clips, temporary, rows)
        # mkdtemp makes private folders; a data set is as readable as any other new folder.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        _put_in_place(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _whole(argument: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} is {value!r}, expected a whole number")
    if not low <= value <= high:
        raise ValueError(f"{argument} is {value}, expected {low} to {high}")
    return value


def _clips(size: str | Mapping[str, int], classes: int) -> dict[str, int]:
    if isinstance(size, str):
        if size not in SIZES:
            allowed = ", ".join(map(repr, SIZES))
            raise ValueError(f"size is {size!r}, expected {allowed} or numbers per split")
        return {split: -(-SIZES[size][split] // classes) * classes for split in SPLITS}
    if set(size) - set(SPLITS):
        raise ValueError(f"size has the keys {sorted(size)}, expected of {', '.join(SPLITS)}")
    clips = {split: _whole(f"size[{split!r}]", size.get(split, 0), 0, 10**6) for split in SPLITS}
    if clips["train"] < classes:
        raise ValueError(
            f"size['train'] is {clips['train']}, expected at least {classes} (classes)"
        )
    return clips


def _untrimmed_clips(size: str | Mapping[str, int]) -> dict[str, int]:
    if isinstance(size, str):
        if size not in UNTRIMMED_SIZES:
            allowed = ", ".join(map(repr, UNTRIMMED_SIZES))
            raise ValueError(f"size is {size!r}, expected {allowed} or numbers per split")
        size = UNTRIMMED_SIZES[size]
    if set(size) - {"val", "test"}:
        raise ValueError(f"size has the keys {sorted(size)}, expected of val, test")
    clips = {split: _whole(f"size[{split!r}]", size.get(split, 0), 0, 10**4) for split in SPLITS}
    if not sum(clips.values()):
        raise ValueError("size asks for no video")
    return clips


def _check_free(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UserError(f"{out}: exists already; choose another folder or use --force")
    try:
        ours = json.loads((out / "dataset.json").read_text()).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{out}: holds other files than a data set made here; it is left alone")


def _put_in_place(temporary: Path, out: Path) -> None:
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.absolute().parent))
        out.rename(old / "old")
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(out)


def _make_clips(
    recipe: Recipe,
    codec: str,
    clips: dict[str, int],
    folder: Path,
    workers: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    total = sum(clips.values())
    workers = min(workers, total)
    jobs = [Job(recipe, codec, clips, str(folder), w, workers) for w in range(workers)]
    done = 0

    def finished() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    if workers == 1:
        return run(jobs[0], finished)
    rows = _run_processes(jobs, finished)
    position = {path: i for i, (_, _, path) in enumerate(_all_items(jobs[0]))}
    return sorted(rows, key=lambda row: position[row["path"]])


def _all_items(job: Job) -> list[tuple[str, int, str]]:
    return list(Job(job.recipe, job.codec, job.clips, job.folder, 0, 1).items())


def _run_processes(jobs: list[Job], finished: Callable[[], None]) -> list[dict[str, Any]]:
    # Fresh interpreters rather than multiprocessing: nothing of this process (threads, an
    # unguarded main script) can get in their way.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = "1"
    processes: list[subprocess.Popen[str]] = []
    lines: queue.Queue[tuple[int, str | None]] = queue.Queue()

    def listen(number: int, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put((number, line.strip()))
        lines.put((number, None))

    rows: list[dict[str, Any]] = []
    try:
        for number, job in enumerate(jobs):
            errors = Path(job.folder) / f".worker-{number}.log"
            with errors.open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ca3d.data.embedded.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(to_json(job))
            process.stdin.close()
            threading.Thread(target=listen, args=(number, process), daemon=True).start()
        running = len(jobs)
        while running:
            number, line = lines.get()
            if line is None:
                running -= 1
                if processes[number].wait() != 0:
                    log_text = (Path(jobs[0].folder) / f".worker-{number}.log").read_text()
                    raise RuntimeError(f"rendering failed:\n{log_text[-2000:]}")
            elif line:
                result = json.loads(line)
                if isinstance(result, str):
                    raise OSError(result)
                rows += result
            else:
                finished()
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    for number, job in enumerate(jobs):
        (Path(job.folder) / f".worker-{number}.log").unlink()
    return rows


def _equalise(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Pads all files to one size, so that no action gives itself away by its bytes."""
    largest = max((folder / row["path"]).stat().st_size for row in rows)
    size = (largest + 8 + 1023) // 1024 * 1024
    for row in rows:
        pad_file(folder / row["path"], size)


def _write_annotations(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the events of untrimmed videos, and takes them out of the rows."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["path", "label", "start", "end"])
        for row in rows:
            events = row.pop("events")
            writer.writerows([row["path"], e["label"], e["start"], e["end"]] for e in events)


def _write_tables(
    recipe: Recipe,
    codec: str,
    clips: dict[str, int],
    folder: Path,
    rows: list[dict[str, Any]],
) -> None:
    if recipe.untrimmed:
        _write_annotations(folder / "annotations.csv", rows)
    for split in SPLITS if not recipe.untrimmed else ():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label"])
            writer.writerows([r["path"], r["label"]] for r in rows if r["split"] == split)
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    about = {
        "name": recipe.name,
        "description": describe(recipe.name),
        "trained_on": describe(recipe.name),
        "horizontal_flip": False,
        "reverse": False,
        "frames_per_second": recipe.frames_per_second,
        "frames": recipe.frames,
        "size": recipe.size,
        "classes": list(recipe.classes),
        "clutter": recipe.clutter,
        "views": recipe.views,
        "seed": recipe.seed,
        "codec": codec,
        "clips": clips,
        "intervals": recipe.intervals,
        "made_by": MADE_BY,
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=1) + "\n")
