"""What the examples in the docstrings of `ca3d` find ready: a video file and a data set."""

from pathlib import Path
from typing import Any

import pytest


def _write_video(path: Path, frames: int = 40) -> None:
    import av
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            image = np.full((48, 64, 3), 6 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def _example_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    _write_video(root / "video.avi")
    splits = {"train": (0, 1, 2), "val": (3,), "test": (4,)}
    for split, numbers in splits.items():
        rows = ["path,label,group"]
        for label in ("jump", "walk"):
            for n in numbers:
                _write_video(root / "dataset" / label / f"{n}.avi", 12)
                rows.append(f"{label}/{n}.avi,{label},person{n}")
        (root / "dataset" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    (root / "dataset" / "dataset.json").write_text('{"name": "example", "horizontal_flip": true}')
    return root


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any], _example_files: Path, tmp_path: Path) -> None:
    from ca3d.data.reader import open_video

    doctest_namespace["open_video"] = open_video
    doctest_namespace["video_file"] = _example_files / "video.avi"
    doctest_namespace["dataset_root"] = _example_files / "dataset"
    doctest_namespace["scratch"] = tmp_path
