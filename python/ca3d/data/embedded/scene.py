"""Backgrounds, floors and clutter behind and in front of the figure."""

import colorsys
from dataclasses import dataclass

import numpy as np

from ca3d.data.embedded.figure import Camera

# Side of the repeated floor texture: a power of two, in texels and metres.
_TILE = 128
FLOOR_METRES = 4.0


def hsv(hue_degrees: float, saturation: float, value: float) -> np.ndarray:
    """RGB colour in [0, 1].

    Args:
        hue_degrees: hue, 0 to 360.
        saturation: 0 to 1.
        value: 0 to 1.

    Returns:
        (3,) float array.

    Example:
        >>> hsv(120.0, 1.0, 0.5)
        array([0. , 0.5, 0. ])
    """
    return np.array(colorsys.hsv_to_rgb(hue_degrees % 360.0 / 360.0, saturation, value))


def smooth_noise(rng: np.random.Generator, size: int, cells: tuple[int, ...]) -> np.ndarray:
    """Periodic value noise of several octaves.

    Args:
        rng: source of randomness.
        size: side of the square in pixels.
        cells: numbers of cells a side, coarse to fine; each octave has half the weight of the one
            before.

    Returns:
        (size, size) float32 of mean about 0 and values within [-1, 1], seamless at the borders.

    Example:
        >>> smooth_noise(np.random.default_rng(0), 32, (2, 4)).shape
        (32, 32)
    """
    total = np.zeros((size, size))
    for octave, count in enumerate(cells):
        grid = rng.uniform(-1.0, 1.0, (count, count))
        position = np.arange(size) * count / size
        cell = position.astype(int)
        weight = position - cell
        weight = weight * weight * (3.0 - 2.0 * weight)
        after = (cell + 1) % count
        rows = grid[cell] * (1 - weight)[:, None] + grid[after] * weight[:, None]
        total += (rows[:, cell] * (1 - weight) + rows[:, after] * weight) * 0.5**octave
    return (total / sum(0.5**octave for octave in range(len(cells)))).astype(np.float32)


def draw_background(
    texture: int,
    hue: float,
    contrast: float,
    camera: Camera,
    target: np.ndarray,
    shadow: np.ndarray,
) -> np.ndarray:
    """A textured wall and a floor in perspective that passes below a moving camera.

    Args:
        texture: seed of everything that is random here.
        hue: main hue in degrees.
        contrast: of the noise on wall and floor, 0 to 1.
        camera: the camera.
        target: (N, 2) ground position that the camera follows.
        shadow: (N, S, S) factors of brightness on the floor.

    Returns:
        (N, S, S, 3) float32 RGB in [0, 1].

    Example:
        >>> camera = Camera(0.0, 0.3, 5.0, 25.0, (32.0, 36.0), 64)
        >>> shadow = np.ones((2, 64, 64), dtype=np.float32)
        >>> draw_background(1, 30.0, 1.0, camera, np.zeros((2, 2)), shadow).shape
        (2, 64, 64, 3)
    """
    rng = np.random.default_rng(texture)
    size = camera.size
    value = rng.uniform(0.3, 0.65)
    wall_colour = hsv(hue, rng.uniform(0.08, 0.4), value)
    floor_value = np.clip(value + rng.choice([-1, 1]) * rng.uniform(0.05, 0.15), 0.25, 0.7)
    floor_colour = hsv(hue + rng.uniform(-12.0, 12.0), rng.uniform(0.08, 0.4), floor_value)
    wall_noise = smooth_noise(rng, size, (2, 5, 11, 23))
    falloff = np.linspace(rng.uniform(0.0, 0.12), rng.uniform(-0.12, 0.0), size)[:, None]
    wall = wall_colour * (1.0 + contrast * rng.uniform(0.1, 0.4) * wall_noise + falloff)[..., None]

    tile = np.float32(contrast * rng.uniform(0.1, 0.3)) * smooth_noise(rng, _TILE, (8, 16, 32))
    # Large squares, so that their passing shows how fast and which way the figure travels.
    squares = int(rng.choice([2, 4]))
    stripes = np.clip(8.0 * np.sin((np.arange(_TILE) + 0.5) * np.pi * squares / _TILE), -1.0, 1.0)
    tile += (rng.uniform(0.05, 0.12) * stripes[:, None] * stripes).astype(np.float32)

    position, depth = camera.ground()
    below = np.flatnonzero(np.isfinite(depth).all(1))
    top = int(below[0]) if len(below) else size
    picture = np.empty((len(target), size, size, 3), dtype=np.float32)
    picture[:, :top] = wall[:top]
    # Far away the texture is finer than a pixel: it fades into its mean, and into the wall.
    near = depth[top:, :, None] / camera.distance
    sharp = np.clip(1.6 - 0.35 * near, 0.0, 1.0)
    haze = np.clip((near - 1.5) / 4.0, 0.0, 0.8)
    bright = (floor_colour * (1.0 - haze)).astype(np.float32)
    texel = (position[top:] * (_TILE / FLOOR_METRES)).astype(np.float32)
    # A multiple of the tile is added, so that truncating rounds down.
    moved = (target * (_TILE / FLOOR_METRES)).astype(np.float32) + 256 * _TILE
    row, column = ((texel[..., i] + moved[:, i, None, None]).astype(np.int32) for i in (0, 1))
    index = (row & (_TILE - 1)) * _TILE + (column & (_TILE - 1))
    pattern = tile.ravel().take(index)
    pattern *= sharp[..., 0].astype(np.float32)
    pattern += 1.0
    pattern *= shadow[:, top:]
    np.multiply(pattern[..., None], bright, out=picture[:, top:])
    picture[:, top:] += (haze * wall[top:]).astype(np.float32)
    return picture


@dataclass(frozen=True)
class Clutter:
    """Shapes that distract: `amount` in [0, 1] sets their number, contrast and motion."""

    amount: float

    def draw(self, rng: np.random.Generator, picture: np.ndarray, in_front: bool) -> None:
        """Draws textured discs, bars and boxes, at rest or drifting at a constant speed.

        How shapes look and move has the same distribution played forwards and backwards.

        Args:
            rng: source of randomness.
            picture: (N, S, S, 3) float32; changed in place.
            in_front: few small shapes that hide parts of the figure, or many behind it.

        Example:
            >>> picture = np.zeros((2, 32, 32, 3), dtype=np.float32)
            >>> Clutter(1.0).draw(np.random.default_rng(0), picture, in_front=False)
            >>> bool(picture.max() > 0)
            True
        """
        frames, size = picture.shape[:2]
        count = round(self.amount * (3 if in_front else 14))
        middle = (np.arange(frames) - (frames - 1) / 2) / max(frames - 1, 1)
        for _ in range(count):
            colour = hsv(rng.uniform(0, 360), rng.uniform(0.1, 0.8), rng.uniform(0.15, 0.95))
            noise = smooth_noise(rng, size, (4, 9, 18))
            extent = size * (rng.uniform(0.02, 0.05, 2) if in_front else rng.uniform(0.04, 0.16, 2))
            if rng.random() < 0.3:
                extent[rng.integers(2)] *= 3.0
            travel = rng.uniform(-0.7, 0.7, 2) * size * (rng.random() < 0.5)
            centre = rng.uniform(0.0, size, 2) + middle[:, None] * travel
            round_shape = rng.random() < 0.5
            row = (np.arange(size) - centre[:, :1]) / extent[0]
            column = (np.arange(size) - centre[:, 1:]) / extent[1]
            if round_shape:
                distance = np.sqrt(row[:, :, None] ** 2 + column[:, None, :] ** 2)
            else:
                distance = np.maximum(np.abs(row)[:, :, None], np.abs(column)[:, None, :])
            cover = np.clip((1.0 - distance) * extent.min() + 0.5, 0.0, 1.0)
            touched = np.flatnonzero(cover)
            strength = 0.5 + 0.5 * self.amount
            paint = colour * (1.0 + 0.5 * noise.ravel()[touched % (size * size)])[:, None]
            flat = picture.reshape(-1, 3)
            mix = (strength * cover.ravel()[touched])[:, None]
            flat[touched] += (mix * (paint - flat[touched])).astype(np.float32)
