"""Renders and encodes a share of a data set's clips; also a process of its own (`python -m`)."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ca3d.data.embedded.encode import CODECS, write_video
from ca3d.data.embedded.intervals import SPLITS
from ca3d.data.embedded.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """The clips of a data set that one worker makes: every `workers`-th, from `worker` on.

    Attributes:
        recipe: what the clips show.
        codec: key of `CODECS`.
        clips: number of clips of each split.
        folder: where to write.
        worker, workers: this share of how many.
    """

    recipe: Recipe
    codec: str
    clips: dict[str, int]
    folder: str
    worker: int
    workers: int

    def items(self) -> Iterator[tuple[str, int, str]]:
        """Split, index and relative path of each clip of this share.

        Example:
            >>> recipe = Recipe("mocap15", 48, 4, 16, 0.0, 0)
            >>> job = Job(recipe, "mpeg4", {"train": 15, "val": 0, "test": 15}, "", 0, 29)
            >>> list(job.items())
            [('train', 0, 'backflip/0000.avi'), ('test', 14, 'walk/0001.avi')]
        """
        names = self.recipe.classes
        suffix = CODECS[self.codec][0]
        made = [0] * len(names)
        position = 0
        for split in SPLITS:
            for index in range(self.clips[split]):
                label = self.recipe.label(index)
                if position % self.workers == self.worker:
                    place = f"{names[label]}/{made[label]:04d}"
                    if self.recipe.untrimmed:
                        place = f"{split}/{index:04d}"
                    yield split, index, place + suffix
                made[label] += 1
                position += 1


def run(job: Job, finished: Callable[[], None]) -> list[dict[str, Any]]:
    """Makes a share of clips.

    Args:
        job: which ones, and where.
        finished: called after each clip.

    Returns:
        One row a clip: path, label, split, the values of what varies, bytes of the file.

    Example:
        >>> import tempfile
        >>> recipe = Recipe("mocap15", 48, 4, 16, 0.0, 0)
        >>> job = Job(recipe, "mpeg4", {"train": 1, "val": 0, "test": 0}, tempfile.mkdtemp(), 0, 1)
        >>> run(job, lambda: None)[0]["path"]
        'backflip/0000.avi'
    """
    rows = []
    for split, index, name in job.items():
        path = Path(job.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        video, varied = job.recipe.render(split, index)
        write_video(path, video, job.recipe.frames_per_second, job.codec)
        row: dict[str, Any] = {"path": name, "split": split}
        if not job.recipe.untrimmed:
            row["label"] = job.recipe.classes[job.recipe.label(index)]
        rows.append({**row, **varied})
        finished()
    return rows


def to_json(job: Job) -> str:
    """A job as text.

    Example:
        >>> recipe = Recipe("mocap15", 48, 4, 16, 0.0, 0)
        >>> job = Job(recipe, "mpeg4", {"train": 1, "val": 0, "test": 0}, "", 0, 1)
        >>> from_json(to_json(job)) == job
        True
    """
    return json.dumps(asdict(job))


def from_json(text: str) -> Job:
    """The job of a text that `to_json` made.

    Example:
        >>> recipe = Recipe("mocap15", 48, 4, 16, 0.0, 0)
        >>> from_json(to_json(Job(recipe, "mpeg4", {}, "", 0, 1))).recipe.name
        'mocap15'
    """
    fields = json.loads(text)
    return Job(**{**fields, "recipe": Recipe(**fields["recipe"])})


def main() -> None:
    """Reads a job from standard input; prints an empty line a clip, at last the rows as JSON.

    Where a file can't be written it prints the reason as a JSON string instead.

    Example:
        >>> callable(main)
        True
    """
    job = from_json(sys.stdin.read())
    try:
        result: list[dict[str, Any]] | str = run(job, lambda: print(flush=True))
    except OSError as error:
        result = error.strerror or str(error)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
