"""The 15 motion-capture clips: the array file, and poses at any time of an endless playback."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

MOTION_FILE = Path(__file__).with_name("mocap_motions.npz")
INT16_MAX = 32767
ROOT_RANGE_METRES = 4.0

# Part of a cyclic clip, and at most so many seconds, over which its end is blended into its start.
LOOP_BLEND_FRACTION = 0.1
LOOP_BLEND_SECONDS = 0.2
# Other clips rest in their last pose, return to the first one in a blend, and rest again.
REST_SECONDS = 0.1
RETURN_SECONDS = 0.4


@dataclass(frozen=True)
class Poses:
    """Joint rotations of N poses.

    Attributes:
        root: (N, 3) position of the pelvis in metres; x ahead, y up, z to the right.
        rotation: (N, 9, 4) unit quaternions (w, x, y, z) of root, chest, neck, right hip, right
            ankle, right shoulder, left hip, left ankle, left shoulder, each relative to its parent.
        hinge: (N, 4) angles in radians of right knee, right elbow, left knee, left elbow.
    """

    root: np.ndarray
    rotation: np.ndarray
    hinge: np.ndarray

    def __len__(self) -> int:
        return len(self.root)

    def __getitem__(self, index: np.ndarray | slice) -> "Poses":
        return Poses(self.root[index], self.rotation[index], self.hinge[index])


@dataclass(frozen=True)
class Motion:
    """One recorded motion.

    Attributes:
        name: the action, for example `"walk"`.
        seconds: (N,) time of each pose.
        poses: the N recorded poses.
        cyclic: whether the recording is meant to be repeated without a pause.
    """

    name: str
    seconds: np.ndarray
    poses: Poses
    cyclic: bool

    @property
    def duration(self) -> float:
        """Recorded length in seconds.

        Example:
            >>> round(load_motions()["run"].duration, 2)
            0.8
        """
        return float(self.seconds[-1])

    @property
    def period(self) -> float:
        """Seconds after which `at` repeats itself (but for the distance covered).

        Example:
            >>> load_motions()["run"].period < load_motions()["run"].duration
            True
        """
        if self.cyclic:
            return self.duration - self._loop_blend
        return self.duration + 2 * REST_SECONDS + RETURN_SECONDS

    @property
    def travel(self) -> np.ndarray:
        """How far the pelvis gets in one period: (3,) metres, level; 0 if it returns.

        Example:
            >>> load_motions()["walk"].travel.round(1) + 0.0
            array([1.1, 0. , 0. ])
        """
        if not self.cyclic:
            return np.zeros(3)
        moved = self._recorded_at(np.array([self.period])).root[0] - self.poses.root[0]
        return np.asarray(moved * [1.0, 0.0, 1.0])

    @property
    def _loop_blend(self) -> float:
        return min(LOOP_BLEND_SECONDS, LOOP_BLEND_FRACTION * self.duration)

    def at(self, seconds: np.ndarray) -> Poses:
        """Poses at any times of the endlessly repeated motion.

        A cyclic motion repeats with its last tenth (0.2 s at most) blended into its start and
        goes on travelling. Any other one rests 0.1 s in its last pose, returns to the first one
        in a blend of 0.4 s, rests there 0.1 s and starts again. So every phase can begin a clip
        of any length.

        Args:
            seconds: (N,) times, of either sign.

        Returns:
            N poses.

        Example:
            >>> walk = load_motions()["walk"]
            >>> poses = walk.at(np.array([0.1, 0.1 + walk.period]))
            >>> bool(np.allclose(poses.hinge[0], poses.hinge[1]))
            True
        """
        seconds = np.asarray(seconds, dtype=np.float64)
        cycle = np.floor(seconds / self.period)
        phase = seconds - cycle * self.period
        return self._cyclic_at(phase, cycle) if self.cyclic else self._returning_at(phase)

    def _cyclic_at(self, phase: np.ndarray, cycle: np.ndarray) -> Poses:
        current = self._recorded_at(phase)
        # During the blend the previous repetition is still fading out.
        previous = self._recorded_at(phase + self.period)
        travel = self.travel
        previous.root[:] -= travel
        weight = _smooth_step(phase / self._loop_blend)
        blended = _blend(previous, current, weight)
        blended.root[:] += cycle[:, None] * travel
        return blended

    def _returning_at(self, phase: np.ndarray) -> Poses:
        # The order of a period: rest in the first pose, play, rest in the last, return.
        played = self._recorded_at(np.clip(phase - REST_SECONDS, 0.0, self.duration))
        first = self._recorded_at(np.zeros_like(phase))
        weight = _smooth_step((phase - 2 * REST_SECONDS - self.duration) / RETURN_SECONDS)
        return _blend(played, first, weight)

    def _recorded_at(self, seconds: np.ndarray) -> Poses:
        right = np.clip(np.searchsorted(self.seconds, seconds), 1, len(self.seconds) - 1)
        start, end = self.seconds[right - 1], self.seconds[right]
        weight = np.clip((seconds - start) / np.maximum(end - start, 1e-9), 0.0, 1.0)
        return _blend(self.poses[right - 1], self.poses[right], weight)


def _smooth_step(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _blend(a: Poses, b: Poses, weight: np.ndarray) -> Poses:
    """Between a (weight 0) and b (weight 1): linear, and normalised-linear for quaternions."""
    w = weight[:, None]
    other = b.rotation * np.where((a.rotation * b.rotation).sum(-1, keepdims=True) < 0, -1.0, 1.0)
    rotation = a.rotation + w[..., None] * (other - a.rotation)
    rotation /= np.linalg.norm(rotation, axis=-1, keepdims=True)
    return Poses(a.root + w * (b.root - a.root), rotation, a.hinge + w * (b.hinge - a.hinge))


@lru_cache(maxsize=1)
def load_motions() -> dict[str, Motion]:
    """The 15 motions by name, in alphabetical order.

    Returns:
        name -> Motion. Positions are exact to 6.1e-5 m, rotations to about 3e-5 rad (16-bit file).

    Raises:
        FileNotFoundError: if the package was installed without its data file.

    Example:
        >>> len(load_motions())
        15
    """
    with np.load(MOTION_FILE) as file:
        rotation = file["rotation"] / INT16_MAX
        rotation /= np.linalg.norm(rotation, axis=-1, keepdims=True)
        poses = Poses(
            file["root"] * (ROOT_RANGE_METRES / INT16_MAX),
            rotation,
            file["hinge"] * (np.pi / INT16_MAX),
        )
        ends = np.cumsum(file["counts"])
        parts = [slice(end - count, end) for end, count in zip(ends, file["counts"], strict=True)]
        return {
            str(name): Motion(str(name), file["seconds"][part].astype(float), poses[part], bool(c))
            for name, part, c in zip(file["names"], parts, file["loops"], strict=True)
        }
