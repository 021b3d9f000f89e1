"""Shows what a random split over clips measures: one model, the same clips, two splits.

Renders recordings, each a still scene of its own under a moving spot, cut into clips. The class of
a recording is drawn at random, so that a class means nothing but "these recordings": on unseen
recordings no model can do better than chance. Whatever a split shows beyond that is its leak.

    python scripts/leakage.py [--out FOLDER] [--recordings 24] [--clips 8] [--epochs 6]
"""

import argparse
import csv
import tempfile
from pathlib import Path

import av
import numpy as np

from ca3d.training import TrainConfig, train

SIDE, FRAMES, RATE = 32, 12, 10


def write_clip(path: Path, scene: np.ndarray, rng: np.random.Generator) -> None:
    """Writes a clip of a scene: a bright spot that passes over it, noise, a change of light."""
    start, step = rng.uniform(0, SIDE, 2), rng.uniform(-2, 2, 2)
    light = rng.uniform(0.85, 1.15)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(FRAMES):
            y, x = (start + number * step) % SIDE
            spot = 120 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8)
            noise = rng.normal(0, 8, scene.shape)
            image = np.clip(scene * light + spot[..., None] + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def make(root: Path, recordings: int, clips: int, seed: int) -> None:
    """Writes root/{even,odd}/rRR_cCC.avi; half of the recordings, drawn at random, are in each."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(["even", "odd"] * (recordings // 2))
    for number, label in enumerate(labels):
        coarse = rng.integers(20, 200, (4, 4, 3)).astype(float)
        scene = coarse.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
        for clip in range(clips):
            path = root / str(label) / f"r{number:02d}_c{clip:02d}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(path, scene, rng)


def main() -> None:
    """Trains on both splits and prints the test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recordings", type=int, default=24)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="leakage-"))
    make(out / "videos", options.recordings, options.clips, options.seed)
    rows = []
    for name, group in (("random over clips", None), ("by recording", r"(r\d+)_c")):
        config = TrainConfig(
            data=str(out / "videos"),
            out=str(out / name.replace(" ", "-")),
            group=group,
            val_fraction=0.25,
            test_fraction=0.25,
            model="ca3d_tiny",
            frames=8,
            stride=1,
            size=SIDE,
            augment="none",
            flip=False,
            batch_size=16,
            optimizer="adamw",
            schedule="onecycle",
            lr=4e-3,
            epochs=options.epochs,
            seed=options.seed,
            workers=0,
            progress="plain",
        )
        test = train(config).test
        assert test is not None
        with (Path(config.out) / "test" / "predictions.csv").open(newline="") as file:
            tested = {Path(row["path"]).name[:3] for row in csv.DictReader(file)}
        rows.append((name, test["videos"], len(tested), test["top1"]))
    print("\nsplit               test clips  recordings   top-1 (chance 50 %)")
    for name, videos, number, accuracy in rows:
        print(f"{name:<20}{videos:>10}{number:>12}{100 * accuracy:>9.1f} %")
    print(
        "Clips of one recording stand or fall together: few recordings scatter widely around 50 %."
    )


if __name__ == "__main__":
    main()
