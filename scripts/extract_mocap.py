"""Packs the 15 DeepMimic motion-capture clips of the `pybullet` package into one array file.

The clips lie in `pybullet_data/data/motions/humanoid3d_*.txt` of the wheel (zlib licence). Get them
with `pip download --no-deps pybullet`, unzip the wheel anywhere, then run

    python scripts/extract_mocap.py WHEEL_FOLDER/pybullet_data/data/motions

Only numbers are carried over: joint rotations, root positions, times and the loop flag, rounded to
16-bit integers. The largest rounding errors are printed.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

DEFAULT_OUT = Path(__file__).parents[1] / "python/ca3d/data/embedded/mocap_motions.npz"

# A source row is: duration, root position (3), then these joints; 4 numbers are a quaternion
# (w, x, y, z), 1 number is a hinge angle in radians.
ROW_JOINTS = (
    ("root", 4),
    ("chest", 4),
    ("neck", 4),
    ("right_hip", 4),
    ("right_knee", 1),
    ("right_ankle", 4),
    ("right_shoulder", 4),
    ("right_elbow", 1),
    ("left_hip", 4),
    ("left_knee", 1),
    ("left_ankle", 4),
    ("left_shoulder", 4),
    ("left_elbow", 1),
)
INT16_MAX = 32767
ROOT_RANGE_METRES = 4.0


def continuous_quaternions(rows: np.ndarray) -> np.ndarray:
    """Unit quaternions (N, J, 4) whose signs never flip from one row to the next."""
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    for previous, current in itertools.pairwise(rows):
        current[(previous * current).sum(-1) < 0] *= -1
    return rows


def to_int16(values: np.ndarray, full_scale: float) -> np.ndarray:
    """Values in [-full_scale, full_scale] as 16-bit integers."""
    if np.abs(values).max() > full_scale:
        raise ValueError(f"a value of {np.abs(values).max():.3f} exceeds the range {full_scale}")
    return np.round(values / full_scale * INT16_MAX).astype(np.int16)


def extract(folder: Path, out: Path) -> None:
    """Reads every humanoid clip of `folder` and writes the array file."""
    files = sorted(folder.glob("humanoid3d_*.txt"))
    if not files:
        raise SystemExit(f"{folder}: no humanoid3d_*.txt here")
    names, loops, counts, seconds, roots, rotations, hinges = [], [], [], [], [], [], []
    for file in files:
        clip = json.loads(file.read_text())
        rows = np.asarray(clip["Frames"], dtype=np.float64)
        quaternions, angles, column = [], [], 4
        for _, width in ROW_JOINTS:
            part = rows[:, column : column + width]
            (quaternions if width == 4 else angles).append(part)
            column += width
        if column != rows.shape[1]:
            raise SystemExit(f"{file}: {rows.shape[1]} columns, expected {column}")
        names.append(file.stem.removeprefix("humanoid3d_"))
        loops.append(clip["Loop"] == "wrap")
        counts.append(len(rows))
        # A row's duration is the time until the next row, so the last one does not count.
        seconds.append(np.concatenate([[0.0], np.cumsum(rows[:-1, 0])]))
        root = rows[:, 1:4] - [rows[0, 1], 0.0, rows[0, 3]]
        roots.append(root)
        rotations.append(continuous_quaternions(np.stack(quaternions, 1)))
        hinges.append(np.concatenate(angles, 1))
    root, rotation, hinge = (np.concatenate(parts) for parts in (roots, rotations, hinges))
    packed = {
        "root": to_int16(root, ROOT_RANGE_METRES),
        "rotation": to_int16(rotation, 1.0),
        "hinge": to_int16(hinge, np.pi),
    }
    np.savez_compressed(
        out,
        names=np.array(names),
        loops=np.array(loops),
        counts=np.array(counts, dtype=np.int32),
        seconds=np.concatenate(seconds).astype(np.float32),
        **packed,
    )
    for key, scale, exact, unit in (
        ("root", ROOT_RANGE_METRES, root, "m"),
        ("rotation", 1.0, rotation, "of a unit quaternion's component"),
        ("hinge", np.pi, hinge, "rad"),
    ):
        error = np.abs(packed[key] / INT16_MAX * scale - exact).max()
        print(f"{key}: largest rounding error {error:.1e} {unit}")
    print(f"{out}: {len(names)} motions, {sum(counts)} poses, {out.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the unzipped pybullet_data/data/motions")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    extract(arguments.folder, arguments.out)
