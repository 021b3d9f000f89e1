"""Clips of the data sets `mocap15` and `mocap30`."""

from dataclasses import dataclass

import numpy as np

from ca3d.data.embedded.figure import Camera, Look, draw_figure, draw_shadow, lowest_point
from ca3d.data.embedded.intervals import YAW, draw
from ca3d.data.embedded.motions import Motion, load_motions
from ca3d.data.embedded.scene import FLOOR_METRES, Clutter, draw_background, hsv
from ca3d.data.embedded.skeleton import Proportions, forward_kinematics

REVERSED_SUFFIX = "-reversed"
# The camera keeps up with a travelling figure, but in spells: for a while the figure drifts through
# the picture (this far to either side, and no faster than it travels), then the camera catches up.
DRIFT_SECONDS = 2.0
CATCH_UP_SECONDS = 0.4
DRIFT_METRES = 0.55


def mocap_classes(with_reversed: bool) -> tuple[str, ...]:
    """Class names, in label order.

    Args:
        with_reversed: also each action played backwards, directly after it.

    Returns:
        15 or 30 names.

    Example:
        >>> mocap_classes(True)[:4]
        ('backflip', 'backflip-reversed', 'cartwheel', 'cartwheel-reversed')
    """
    names = []
    for name in load_motions():
        names.append(name.replace("_", "-"))
        if with_reversed:
            names.append(names[-1] + REVERSED_SUFFIX)
    return tuple(names)


@dataclass(frozen=True)
class MocapClip:
    """Everything that varies between two clips of one class.

    Attributes:
        motion: name in `load_motions()`.
        backwards: play the finished clip from its end.
        phase: where the motion begins, as a fraction of its period.
        spell: where the camera's drifting and catching up begins, as a fraction of its period.
        origin: (x, z) on the floor's pattern where the recording begins, metres; without it the
            pattern would tell how far the figure has come.
        tempo: speed relative to the recording.
        body: limb lengths.
        camera: the camera.
        look: colours, build, light.
        background_hue, background_texture: see `draw_background`.
        shadow: darkness of the shadow.
        clutter: 0 to 1.
        seed: seed of clutter and sensor noise.
    """

    motion: str
    backwards: bool
    phase: float
    spell: float
    origin: tuple[float, float]
    tempo: float
    body: Proportions
    camera: Camera
    look: Look
    background_hue: float
    background_texture: int
    shadow: float
    clutter: float
    seed: int

    def varied(self) -> dict[str, float]:
        """What the disjoint intervals of the splits are about.

        Example:
            >>> clip = draw_clip(np.random.default_rng(0), 0, "train", 64, 0.0, False)
            >>> sorted(clip.varied())[:2]
            ['arm_length', 'background_hue']
        """
        return {
            "yaw": float(np.degrees(self.camera.yaw)),
            "tempo": self.tempo,
            "leg_length": self.body.leg,
            "arm_length": self.body.arm,
            "build": self.look.build,
            "background_hue": self.background_hue,
            "background_texture": self.background_texture,
        }


def draw_clip(
    rng: np.random.Generator,
    label: int,
    split: str,
    size: int,
    clutter: float,
    with_reversed: bool,
    views: str = "side",
) -> MocapClip:
    """Draws a clip's view, tempo, body and surroundings.

    Args:
        rng: source of randomness.
        label: index into `mocap_classes(with_reversed)`.
        split: decides the intervals.
        size: side of the picture in pixels.
        clutter: 0 to 1.
        with_reversed: whether odd labels are reversed motions.
        views: a key of `YAW`.

    Returns:
        The clip's description.

    Example:
        >>> draw_clip(np.random.default_rng(0), 1, "train", 64, 0.0, True).backwards
        True
    """
    motion = list(load_motions())[label // 2 if with_reversed else label]
    hue = draw(rng, "background_hue", split)
    camera = Camera(
        yaw=np.radians(draw(rng, views, split, YAW)),
        pitch=rng.uniform(np.radians(8), np.radians(30)),
        distance=rng.uniform(3.6, 6.0),
        scale=size * rng.uniform(0.42, 0.50),
        center=(size * (0.5 + rng.uniform(-0.08, 0.08)), size * (0.55 + rng.uniform(-0.05, 0.05))),
        size=size,
    )
    side = rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 0.7)
    light = np.array([side, rng.uniform(0.5, 0.8), rng.uniform(0.25, 0.6)])
    # Clothes keep away from the background's hue so that a person can see the figure.
    shirt_hue = hue + 180.0 + rng.uniform(-100.0, 100.0)
    skin = hsv(rng.uniform(14.0, 32.0), rng.uniform(0.3, 0.6), rng.uniform(0.5, 1.0))
    look = Look(
        skin=skin,
        shirt=hsv(shirt_hue, rng.uniform(0.45, 0.9), rng.uniform(0.75, 1.0)),
        trousers=hsv(rng.uniform(0, 360), rng.uniform(0.2, 0.7), rng.uniform(0.1, 0.3)),
        shoes=hsv(rng.uniform(0, 360), rng.uniform(0.0, 0.6), rng.choice([0.12, 0.95])),
        hair=hsv(rng.uniform(10.0, 45.0), rng.uniform(0.2, 0.7), rng.uniform(0.08, 0.5)),
        build=draw(rng, "build", split),
        light=light / np.linalg.norm(light),
    )
    return MocapClip(
        motion=motion,
        backwards=with_reversed and label % 2 == 1,
        phase=rng.random(),
        spell=rng.random(),
        origin=(rng.uniform(0.0, FLOOR_METRES), rng.uniform(0.0, FLOOR_METRES)),
        tempo=draw(rng, "tempo", split),
        body=Proportions(draw(rng, "leg_length", split), draw(rng, "arm_length", split)),
        camera=camera,
        look=look,
        background_hue=hue,
        background_texture=int(draw(rng, "background_texture", split)),
        shadow=rng.uniform(0.3, 0.55),
        clutter=clutter,
        seed=int(rng.integers(2**31)),
    )


def render_mocap(clip: MocapClip, frames: int, frames_per_second: float) -> np.ndarray:
    """Renders a clip.

    Args:
        clip: what to show.
        frames: number of frames.
        frames_per_second: rate of the video; the motion runs at `clip.tempo` times the recording.

    Returns:
        (frames, S, S, 3) uint8 RGB.

    Example:
        >>> clip = draw_clip(np.random.default_rng(0), 0, "train", 48, 0.0, False)
        >>> render_mocap(clip, 4, 16.0).shape
        (4, 48, 48, 3)
    """
    motion = load_motions()[clip.motion]
    joints, target = _performance(motion, clip, frames, frames_per_second)
    video = _draw(clip, joints, target)
    return np.ascontiguousarray(video[::-1]) if clip.backwards else video


def render_empty(clip: MocapClip, frames: int) -> np.ndarray:
    """Renders a clip's room without the figure.

    Args:
        clip: gives room and camera.
        frames: number of frames.

    Returns:
        (frames, S, S, 3) uint8 RGB.

    Example:
        >>> clip = draw_clip(np.random.default_rng(0), 0, "train", 48, 0.0, False)
        >>> render_empty(clip, 4).shape
        (4, 48, 48, 3)
    """
    return _draw(clip, None, np.zeros((frames, 2)))


def _draw(clip: MocapClip, joints: np.ndarray | None, target: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(clip.seed)
    size = clip.camera.size
    shadow = np.ones((len(target), size, size), dtype=np.float32)
    if joints is not None:
        shadow = draw_shadow(joints, target, clip.camera, clip.look, clip.shadow)
    picture = draw_background(
        clip.background_texture,
        clip.background_hue,
        0.3 + 0.7 * clip.clutter,
        clip.camera,
        target + clip.origin,
        shadow,
    )
    clutter = Clutter(clip.clutter)
    clutter.draw(rng, picture, in_front=False)
    if joints is not None:
        draw_figure(picture, joints, target, clip.camera, clip.look)
    clutter.draw(rng, picture, in_front=True)
    _add_sensor_noise(rng, picture)
    picture *= 255.0
    return np.clip(picture, 0.0, 255.0, out=picture).astype(np.uint8)


def _performance(
    motion: Motion, clip: MocapClip, frames: int, frames_per_second: float
) -> tuple[np.ndarray, np.ndarray]:
    """Joints (frames, 19, 3) standing on the ground, and the camera's target (frames, 2)."""
    clock = np.arange(frames) / frames_per_second
    seconds = clip.phase * motion.period + clock * clip.tempo
    # A whole period, wherever the clip begins: its mean place, and its height above the ground.
    # Other legs and other thickness move the soles.
    period = np.linspace(0.0, motion.period, 48, endpoint=False)
    cycle = forward_kinematics(motion.at(period), clip.body)
    speed = motion.travel[[0, 2]] * clip.body.leg / motion.period
    joints = forward_kinematics(motion.at(seconds), clip.body)
    joints[..., 1] -= np.quantile(lowest_point(cycle, clip.look.build), 0.15)
    middle = (cycle[:, 0, ::2] - period[:, None] * speed).mean(0)
    pace = np.linalg.norm(speed) * clip.tempo
    reach = min(DRIFT_METRES, 0.5 * DRIFT_SECONDS * pace) / max(float(np.linalg.norm(speed)), 1e-9)
    lead = seconds - reach * _drift(clock, clip.spell)
    return joints, middle + lead[:, None] * speed


def _drift(clock: np.ndarray, spell: float) -> np.ndarray:
    """From -1 to 1 at a constant rate, quickly back, and so on; `spell` in [0, 1) is the phase.

    The phase is uniform, so that the first frame of a clip is like any other frame: where the
    figure stands in it does not tell whether the clip is played forwards or backwards.
    """
    length = DRIFT_SECONDS + CATCH_UP_SECONDS
    phase = (clock / length + spell) % 1.0 * length
    back = np.clip((phase - DRIFT_SECONDS) / CATCH_UP_SECONDS, 0.0, 1.0)
    back = back * back * (3.0 - 2.0 * back)
    return np.where(phase < DRIFT_SECONDS, 2.0 * phase / DRIFT_SECONDS - 1.0, 1.0 - 2.0 * back)


def _add_sensor_noise(rng: np.random.Generator, picture: np.ndarray) -> None:
    """Adds weak noise, fresh in every frame: random crops of one larger noise picture."""
    frames, size = picture.shape[:2]
    grain = rng.standard_normal((size + 32, size + 32, 1)).astype(np.float32)
    grain *= rng.uniform(0.004, 0.012)
    for frame, (row, column) in enumerate(rng.integers(0, 33, (frames, 2))):
        picture[frame] += grain[row : row + size, column : column + size]
