"""Clips of the data set `motion-order`: the class is the order of motions, nothing else."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ca3d.data.embedded.intervals import Intervals, draw
from ca3d.data.embedded.scene import Clutter, hsv, smooth_noise

# A sprite's outline is a Fourier curve: the splits have outlines of different symmetry.
SPRITE_INTERVALS: Mapping[str, Mapping[str, Intervals]] = {
    "lobes": {
        "train": ((3, 4), (5, 7), (8, 9)),
        "val": ((9, 10),),
        "test": ((4, 5), (7, 8)),
    },
    "sprite_seed": {
        "train": ((0, 1_000_000),),
        "val": ((1_000_000, 2_000_000),),
        "test": ((2_000_000, 3_000_000),),
    },
    "background_texture": {
        "train": ((0, 1_000_000),),
        "val": ((1_000_000, 2_000_000),),
        "test": ((2_000_000, 3_000_000),),
    },
}

LEAST_FRAMES = 16

# segments -> name and angle (degrees, 0 to the right, 90 up) of both senses of each axis
_AXES: dict[int, tuple[tuple[tuple[str, float], tuple[str, float]], ...]] = {
    2: ((("right", 0.0), ("left", 180.0)), (("up", 90.0), ("down", 270.0))),
    3: (
        (("right", 0.0), ("left", 180.0)),
        (("upright", 60.0), ("downleft", 240.0)),
        (("upleft", 120.0), ("downright", 300.0)),
    ),
}


def order_classes(segments: int) -> tuple[str, ...]:
    """Class names: every order of the axes with every choice of senses.

    Each clip moves once along each axis. So the set of its frames shows the same whatever the
    order and the senses are: a line of sprites along each axis.

    Args:
        segments: 2 (right/left and up/down: 8 classes) or 3 (axes 60 degrees apart: 48 classes).

    Returns:
        Names such as `right-then-up`.

    Raises:
        ValueError: for other numbers of segments.

    Example:
        >>> order_classes(2)[:3]
        ('right-then-up', 'right-then-down', 'left-then-up')
    """
    return tuple("-then-".join(name for name, _ in motions) for motions in _orders(segments))


def _orders(segments: int) -> list[tuple[tuple[str, float], ...]]:
    if segments not in _AXES:
        raise ValueError(f"segments is {segments}, expected 2 or 3")
    return [
        motions
        for axes in itertools.permutations(_AXES[segments])
        for motions in itertools.product(*axes)
    ]


@dataclass(frozen=True)
class OrderClip:
    """Everything that varies between two clips.

    Attributes:
        angles: direction of each motion in degrees.
        lobes, sprite_seed: outline and pattern of the sprite.
        background_texture: seed of the background.
        step: fraction of the picture's side that the sprite moves a frame.
        size: side of the picture in pixels.
        clutter: 0 to 1.
        seed: seed of starting points, clutter and noise.
    """

    angles: tuple[float, ...]
    lobes: int
    sprite_seed: int
    background_texture: int
    step: float
    size: int
    clutter: float
    seed: int

    def varied(self) -> dict[str, float]:
        """What the disjoint intervals of the splits are about.

        Example:
            >>> rng = np.random.default_rng(0)
            >>> draw_order_clip(rng, 0, "val", 64, 0.0, 2).varied()["lobes"]
            9
        """
        return {
            "lobes": self.lobes,
            "sprite_seed": self.sprite_seed,
            "background_texture": self.background_texture,
        }


def draw_order_clip(
    rng: np.random.Generator, label: int, split: str, size: int, clutter: float, segments: int
) -> OrderClip:
    """Draws a clip's sprite, speed and background.

    Args:
        rng: source of randomness.
        label: index into `order_classes(segments)`.
        split: decides the sprites.
        size: side of the picture in pixels.
        clutter: 0 to 1.
        segments: motions in a row.

    Returns:
        The clip's description.

    Example:
        >>> draw_order_clip(np.random.default_rng(0), 0, "train", 64, 0.0, 2).angles
        (0.0, 90.0)
    """
    return OrderClip(
        angles=tuple(angle for _, angle in _orders(segments)[label]),
        lobes=int(draw(rng, "lobes", split, SPRITE_INTERVALS)),
        sprite_seed=int(draw(rng, "sprite_seed", split, SPRITE_INTERVALS)),
        background_texture=int(draw(rng, "background_texture", split, SPRITE_INTERVALS)),
        step=rng.uniform(0.05, 0.1),
        size=size,
        clutter=clutter,
        seed=int(rng.integers(2**31)),
    )


def render_order(clip: OrderClip, frames: int) -> np.ndarray:
    """Renders a clip: the sprite moves, vanishes, appears anywhere, moves on.

    Every motion begins at a point drawn uniformly over the picture, whose opposite borders are
    joined, and lasts equally long, so neither a place nor a count of frames tells anything.

    Args:
        clip: what to show.
        frames: number of frames, at least 16; a pause is an eighth of them.

    Returns:
        (frames, S, S, 3) uint8 RGB.

    Raises:
        ValueError: if the frames are too few.

    Example:
        >>> clip = draw_order_clip(np.random.default_rng(0), 0, "train", 32, 0.0, 2)
        >>> render_order(clip, 16).shape
        (16, 32, 32, 3)
    """
    segments = len(clip.angles)
    # The longer the clip, the longer the pause that a model must look across.
    pause = frames // 8
    moving = (frames - pause * (segments - 1)) // segments
    if frames < LEAST_FRAMES:
        raise ValueError(f"frames is {frames}, expected at least {LEAST_FRAMES}")
    rng = np.random.default_rng(clip.seed)
    size = clip.size
    picture = np.empty((frames, size, size, 3), dtype=np.float32)
    picture[:] = _background(clip)
    Clutter(clip.clutter).draw(rng, picture, in_front=False)
    alpha, colour = _sprite(clip)
    # Frames that divide nowhere are spread at random before, between and after the motions.
    spare = frames - moving * segments - pause * (segments - 1)
    gaps = rng.multinomial(spare, np.full(segments + 1, 1.0 / (segments + 1)))
    frame = 0
    for k, angle in enumerate(clip.angles):
        frame += gaps[k] + (pause if k else 0)
        start = rng.uniform(0.0, size, 2)
        direction = np.array([-np.sin(np.radians(angle)), np.cos(np.radians(angle))])
        for i in range(moving):
            place = start + direction * (i * clip.step * size)
            _stamp(picture[frame + i], alpha, colour, place)
        frame += moving
    Clutter(clip.clutter).draw(rng, picture, in_front=True)
    picture += (0.02 * rng.standard_normal(picture.shape[:3], dtype=np.float32))[..., None]
    picture *= 255.0
    return np.clip(picture, 0.0, 255.0, out=picture).astype(np.uint8)


def _background(clip: OrderClip) -> np.ndarray:
    rng = np.random.default_rng(clip.background_texture)
    colour = hsv(rng.uniform(0, 360), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.5))
    noise = smooth_noise(rng, clip.size, (2, 4, 8, 16))
    return (colour * (1.0 + rng.uniform(0.1, 0.5) * noise)[..., None]).astype(np.float32)


def _sprite(clip: OrderClip) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (s, s) and colours (s, s, 3) of a sprite about 0.3 pictures wide."""
    rng = np.random.default_rng(clip.sprite_seed)
    side = int(0.45 * clip.size) | 1
    grid = (np.arange(side) - side // 2) / (0.15 * clip.size)
    y, x = grid[:, None], grid[None, :]
    angle, distance = np.arctan2(y, x) + rng.uniform(0, 2 * np.pi), np.hypot(x, y)
    outline = 1.0 + rng.uniform(0.15, 0.35) * np.cos(clip.lobes * angle)
    outline += rng.uniform(0.0, 0.1) * np.cos(2 * clip.lobes * angle + rng.uniform(0, 6))
    alpha = np.clip((outline - distance) * 0.15 * clip.size + 0.5, 0.0, 1.0)
    if rng.random() < 0.4:
        alpha *= np.clip((distance - 0.35) * 0.15 * clip.size + 0.5, 0.0, 1.0)
    hue = rng.uniform(0, 360)
    outer = hsv(hue, rng.uniform(0.2, 0.8), rng.uniform(0.75, 1.0))
    inner = hsv(hue + rng.uniform(60, 300), rng.uniform(0.2, 0.8), rng.uniform(0.6, 1.0))
    mix = np.clip((0.6 * outline - distance) * 0.15 * clip.size + 0.5, 0.0, 1.0)[..., None]
    lit = 1.0 - 0.15 * (x + y)[..., None]
    return alpha.astype(np.float32), ((outer + mix * (inner - outer)) * lit).astype(np.float32)


def _stamp(picture: np.ndarray, alpha: np.ndarray, colour: np.ndarray, place: np.ndarray) -> None:
    """Blends a sprite into one picture (S, S, 3) at a (row, column) that wraps around."""
    size, side = len(picture), len(alpha)
    corner = np.floor(place).astype(int) - side // 2
    for axis, part in enumerate(place - np.floor(place)):
        # Sub-pixel positions: a weighted mean of the sprite and its neighbour.
        shape = [(1, 0) if a == axis else (0, 0) for a in range(2)]
        keep = slice(None, -1)
        moved_colour = np.pad(colour, [*shape, (0, 0)], mode="edge")
        moved_alpha = np.pad(alpha, shape)
        index = (keep, slice(None)) if axis == 0 else (slice(None), keep)
        alpha = (1 - part) * alpha + part * moved_alpha[index]
        colour = (1 - part) * colour + part * moved_colour[index]
    rows = (corner[0] + np.arange(side)) % size
    columns = (corner[1] + np.arange(side)) % size
    window = np.ix_(rows, columns)
    behind = picture[window]
    picture[window] = behind + alpha[..., None] * (colour - behind)
