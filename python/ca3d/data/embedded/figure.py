"""Draws a shaded, anti-aliased figure of capsules seen by a perspective camera."""

from dataclasses import dataclass

import numpy as np

from ca3d.data.embedded.skeleton import JOINT_INDEX

# Height of the point that the camera looks at, in metres above the ground.
TARGET_HEIGHT = 0.82


@dataclass(frozen=True)
class Camera:
    """A perspective camera that looks at a point above the ground.

    Attributes:
        yaw: radians about the vertical axis; at 0 the camera stands at +z and sees x to the right.
        pitch: how far the camera looks down, radians.
        distance: metres from the target.
        scale: pixels a metre at the target's distance.
        center: (u, v) pixel on which the target falls.
        size: side of the square picture in pixels.
    """

    yaw: float
    pitch: float
    distance: float
    scale: float
    center: tuple[float, float]
    size: int

    @property
    def focal(self) -> float:
        """Focal length in pixels.

        Example:
            >>> Camera(0.0, 0.2, 5.0, 25.0, (32.0, 32.0), 64).focal
            125.0
        """
        return self.scale * self.distance

    def project(self, points: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Pixel positions and depths of points in space.

        Args:
            points: (N, J, 3) world positions in metres.
            target: (N, 2) ground position (x, z) that the camera follows.

        Returns:
            (N, J, 3): u to the right, v downwards (pixels), depth (metres from the camera).

        Example:
            >>> camera = Camera(0.3, 0.2, 5.0, 25.0, (32.0, 30.0), 64)
            >>> camera.project(np.array([[[0, TARGET_HEIGHT, 0]]]), np.zeros((1, 2))).ravel()
            array([32., 30.,  5.])
        """
        x = points[..., 0] - target[:, None, 0]
        y = points[..., 1] - TARGET_HEIGHT
        z = points[..., 2] - target[:, None, 1]
        right = x * np.cos(self.yaw) + z * np.sin(self.yaw)
        away = x * np.sin(self.yaw) - z * np.cos(self.yaw)
        up = y * np.cos(self.pitch) + away * np.sin(self.pitch)
        depth = self.distance + away * np.cos(self.pitch) - y * np.sin(self.pitch)
        depth = np.maximum(depth, 0.3 * self.distance)
        u = self.center[0] + self.focal * right / depth
        v = self.center[1] - self.focal * up / depth
        return np.stack([u, v, depth], -1)

    def ground(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each pixel's line of sight meets the ground.

        Returns:
            position: (S, S, 2) ground position (x, z) relative to the target, metres; 0 above the
                horizon. depth: (S, S) metres along the line of sight, infinite above the horizon.

        Example:
            >>> camera = Camera(0.0, 0.4, 5.0, 25.0, (32.0, 30.0), 64)
            >>> position, depth = camera.ground()
            >>> bool(np.isfinite(depth[-1]).all())
            True
        """
        pixel = np.arange(self.size)
        x = (pixel - self.center[0]) / self.focal
        y = (self.center[1] - pixel[:, None]) / self.focal
        sine, cosine = np.sin(self.pitch), np.cos(self.pitch)
        falling = sine - y * cosine
        below = falling > 1e-3
        depth = (TARGET_HEIGHT + self.distance * sine) / np.where(below, falling, 1.0)
        right = depth * x
        away = depth * y * sine + (depth - self.distance) * cosine
        position = np.stack(
            [
                right * np.cos(self.yaw) + away * np.sin(self.yaw),
                right * np.sin(self.yaw) - away * np.cos(self.yaw),
            ],
            -1,
        )
        depth = np.broadcast_to(np.where(below, depth, np.inf), position.shape[:2])
        return np.where(below[..., None], position, 0.0), depth


@dataclass(frozen=True)
class Look:
    """Colours and thickness of a figure.

    Attributes:
        skin, shirt, trousers, shoes, hair: RGB in [0, 1].
        build: thickness of the limbs relative to the default.
        light: (3,) unit vector towards the light: right, up, towards the viewer.
    """

    skin: np.ndarray
    shirt: np.ndarray
    trousers: np.ndarray
    shoes: np.ndarray
    hair: np.ndarray
    build: float
    light: np.ndarray


# start joint, end joint, radii in metres at both ends, how far the capsule begins and ends beyond
# the joints (as fractions of the bone), material
_CAPSULES: tuple[tuple[str, str, float, float, float, float, str], ...] = (
    ("neck", "head", 0.06, 0.065, 0.0, 0.4, "skin"),
    ("neck", "head", 0.09, 0.1, 0.7, 1.0, "skin"),
    ("crown", "crown", 0.1, 0.1, 0.0, 0.0, "hair"),
    ("chest", "neck", 0.125, 0.07, 0.0, 1.1, "shirt"),
    ("pelvis", "chest", 0.115, 0.13, 0.1, 1.1, "shirt"),
    ("right_shoulder", "left_shoulder", 0.075, 0.075, 0.06, 0.94, "shirt"),
    ("right_hip", "left_hip", 0.1, 0.1, 0.0, 1.0, "trousers"),
    ("right_shoulder", "right_elbow", 0.06, 0.048, 0.0, 1.0, "shirt"),
    ("right_elbow", "right_wrist", 0.045, 0.038, 0.0, 1.25, "skin"),
    ("left_shoulder", "left_elbow", 0.06, 0.048, 0.0, 1.0, "shirt"),
    ("left_elbow", "left_wrist", 0.045, 0.038, 0.0, 1.25, "skin"),
    ("right_hip", "right_knee", 0.09, 0.066, 0.0, 1.0, "trousers"),
    ("right_knee", "right_ankle", 0.064, 0.048, 0.0, 1.0, "trousers"),
    ("right_ankle", "right_toe", 0.054, 0.042, -0.2, 1.0, "shoes"),
    ("left_hip", "left_knee", 0.09, 0.066, 0.0, 1.0, "trousers"),
    ("left_knee", "left_ankle", 0.064, 0.048, 0.0, 1.0, "trousers"),
    ("left_ankle", "left_toe", 0.054, 0.042, -0.2, 1.0, "shoes"),
)
# Torso, arms and legs as one capsule each are enough for a blurred shadow.
_SHADOW_CAPSULES = (
    *((3, 0.16), (4, 0.16), (8, 0.07), (10, 0.07)),
    *((11, 0.09), (12, 0.09), (14, 0.09), (15, 0.09)),
)
_STARTS = np.array([JOINT_INDEX[c[0]] for c in _CAPSULES])
_ENDS = np.array([JOINT_INDEX[c[1]] for c in _CAPSULES])
_RADII = np.array([c[2:4] for c in _CAPSULES])
_EXTENT = np.array([c[4:6] for c in _CAPSULES])
_LEFT = np.array(["left" in c[0] and "left" in c[1] for c in _CAPSULES])


def capsule_ends(joints: np.ndarray) -> np.ndarray:
    """End points of the 17 capsules that make a figure.

    Args:
        joints: (N, 19, 3) joint positions.

    Returns:
        (N, 17, 2, 3) in the unit of `joints`.

    Example:
        >>> capsule_ends(np.zeros((4, 19, 3))).shape
        (4, 17, 2, 3)
    """
    start, bone = joints[:, _STARTS], joints[:, _ENDS] - joints[:, _STARTS]
    return start[:, :, None] + bone[:, :, None] * _EXTENT[None, :, :, None]


def lowest_point(joints: np.ndarray, build: float) -> np.ndarray:
    """Height of the lowest point of a figure's surface.

    Args:
        joints: (N, 19, 3) world positions in metres.
        build: thickness of the limbs.

    Returns:
        (N,) metres.

    Example:
        >>> lowest_point(np.zeros((1, 19, 3)), 1.0).round(2)
        array([-0.13])
    """
    return (capsule_ends(joints)[..., 1] - _RADII * build).min((1, 2))


def draw_shadow(
    joints: np.ndarray, target: np.ndarray, camera: Camera, look: Look, strength: float
) -> np.ndarray:
    """Darkening of the ground under a figure.

    Args:
        joints: (N, 19, 3) world positions in metres; the ground is y = 0.
        target: (N, 2) ground position that the camera follows.
        camera: the camera.
        look: gives thickness and light.
        strength: darkening at the core, 0 to 1.

    Returns:
        (N, S, S) float32 factors in [1 - strength, 1].

    Example:
        >>> joints = np.zeros((1, 19, 3))
        >>> camera = Camera(0.0, 0.4, 5.0, 25.0, (32.0, 30.0), 64)
        >>> white = np.ones(3)
        >>> look = Look(white, white, white, white, white, 1.0, np.array([0.0, 0.8, 0.6]))
        >>> draw_shadow(joints, np.zeros((1, 2)), camera, look, 0.5).min() > 0.49
        np.True_
    """
    # The shadow is soft, so a quarter of the pixels is enough.
    size = camera.size // 2
    ends = capsule_ends(joints)
    height = np.maximum(ends[..., 1], 0.0)
    # Lit from nearly overhead: the shadow leans away from the light, to the side of the picture.
    lean = -0.35 * look.light[0] / max(look.light[1], 0.3)
    flat = ends.copy()
    flat[..., 0] += lean * height * np.cos(camera.yaw)
    flat[..., 2] += lean * height * np.sin(camera.yaw)
    flat[..., 1] = 0.0
    chosen = [i for i, _ in _SHADOW_CAPSULES]
    frames = len(joints)
    pixels = camera.project(flat[:, chosen].reshape(frames, -1, 3), target)
    pixels = pixels.reshape(frames, len(chosen), 2, 3)
    # A ball's shadow is a disc on the ground, seen foreshortened by the pitch.
    squeeze = 1.0 / max(np.sin(camera.pitch), 0.2)
    u, v = (pixels[..., 0] + 0.5) / 2 - 0.5, ((pixels[..., 1] + 0.5) / 2 - 0.5) * squeeze
    per_metre = camera.focal / pixels[..., 2].mean(-1) / 2
    widths = np.array([radius for _, radius in _SHADOW_CAPSULES]) * look.build
    # The higher above the ground, the softer and the fainter.
    mean_height = height[:, chosen].mean(-1)
    radius = per_metre * (widths + 0.12 * mean_height)
    softness = np.maximum(per_metre * (0.05 + 0.15 * mean_height), 0.7)
    faint = 1.0 / (1.0 + 0.8 * mean_height)
    light = np.ones((frames, size, size), dtype=np.float32)
    column = np.arange(size, dtype=np.float32)
    row = column[:, None] * np.float32(squeeze)
    for k in range(len(chosen)):
        distance = _distance(column, row, u[:, k], v[:, k])
        # Full shadow inside the outline, none outside of it, linear across its soft border.
        slope = strength * faint[:, k] / softness[:, k]
        deepest = 1.0 - strength * faint[:, k]
        border = 1.0 - slope * (radius[:, k] + 0.5 * softness[:, k])
        distance *= slope.astype(np.float32)[:, None, None]
        distance += border.astype(np.float32)[:, None, None]
        np.maximum(distance, deepest.astype(np.float32)[:, None, None], out=distance)
        np.minimum(light, distance, out=light)
    return _double(light)


def _distance(column: np.ndarray, row: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(N, S, S) distances of pixels from N segments with end points u, v (N, 2)."""
    u, v = u.astype(np.float32), v.astype(np.float32)
    du, dv = u[:, 1] - u[:, 0], v[:, 1] - v[:, 0]
    inverse = 1.0 / np.maximum(du * du + dv * dv, 1e-6)
    x = column - u[:, 0, None, None]
    y = row - v[:, 0, None, None]
    t = x * (du * inverse)[:, None, None] + y * (dv * inverse)[:, None, None]
    np.maximum(t, 0.0, out=t)
    np.minimum(t, 1.0, out=t)
    ex = t * du[:, None, None]
    np.subtract(x, ex, out=ex)
    ex *= ex
    t *= dv[:, None, None]
    np.subtract(y, t, out=t)
    t *= t
    ex += t
    return np.sqrt(ex, out=ex)


def _double(image: np.ndarray) -> np.ndarray:
    """(N, S, S) -> (N, 2 S, 2 S), linear in both directions."""
    for axis in (1, 2):
        before = np.concatenate([image.take([0], axis), image], axis)
        after = np.concatenate([image, image.take([-1], axis)], axis)
        low = before[:, :-1] if axis == 1 else before[:, :, :-1]
        high = after[:, 1:] if axis == 1 else after[:, :, 1:]
        pair = np.stack([0.75 * image + 0.25 * low, 0.75 * image + 0.25 * high], axis + 1)
        shape = list(image.shape)
        shape[axis] *= 2
        image = pair.reshape(shape)
    return image


def draw_figure(
    picture: np.ndarray, joints: np.ndarray, target: np.ndarray, camera: Camera, look: Look
) -> None:
    """Draws a figure over pictures, the farthest capsule first.

    Each pixel of a capsule gets the colour of a ball's surface there, lit from `look.light`, darker
    towards the outline and with the distance; edges are blended by coverage.

    Args:
        picture: (N, S, S, 3) float32 RGB in [0, 1], contiguous; changed in place.
        joints: (N, 19, 3) world positions in metres.
        target: (N, 2) ground position that the camera follows.
        camera: the camera.
        look: colours, thickness, light.

    Example:
        >>> picture = np.zeros((1, 64, 64, 3), dtype=np.float32)
        >>> camera = Camera(0.0, 0.4, 5.0, 25.0, (32.0, 30.0), 64)
        >>> white = np.ones(3)
        >>> look = Look(white, white, white, white, white, 1.0, np.array([0.0, 0.8, 0.6]))
        >>> draw_figure(picture, np.zeros((1, 19, 3)), np.zeros((1, 2)), camera, look)
        >>> bool(picture.max() > 0.5)
        True
    """
    frames, size = picture.shape[:2]
    count = len(_CAPSULES)
    ends = capsule_ends(joints).reshape(frames, -1, 3)
    pixels = camera.project(ends, target).reshape(frames, count, 2, 3)
    depth = pixels[..., 2]
    radius = _RADII * look.build * camera.focal / depth
    colour = np.stack([getattr(look, c[6]) for c in _CAPSULES])
    colour = np.where(_LEFT[:, None], 0.88 * colour, colour)
    # Nearer limbs are brighter: about 15 % over a body's depth.
    brightness = np.clip(1.0 - 0.15 * (depth.mean(-1) - camera.distance), 0.75, 1.2)
    order = np.argsort(-depth.mean(-1), 1, kind="stable")
    each = np.arange(frames)[:, None]
    pixels, radius, brightness = pixels[each, order], radius[each, order], brightness[each, order]
    colours = colour[order] * brightness[..., None]

    low = (pixels[..., :2] - radius[..., None]).min(2) - 1.0
    high = (pixels[..., :2] + radius[..., None]).max(2) + 1.0
    flat = picture.reshape(-1, 3)
    for k in range(count):
        side = int(np.ceil((high[:, k] - low[:, k]).max())) + 1
        _paint_capsules(
            flat, size, side, low[:, k], pixels[:, k], radius[:, k], colours[:, k], look.light
        )


def _paint_capsules(
    flat: np.ndarray,
    size: int,
    side: int,
    low: np.ndarray,
    ends: np.ndarray,
    radius: np.ndarray,
    colours: np.ndarray,
    light: np.ndarray,
) -> None:
    """Paints one capsule a picture, inside windows of `side` pixels at `low` (N, 2)."""
    corner = np.floor(low).astype(np.int64)
    grid = np.arange(side)
    column, row = corner[:, :1] + grid, corner[:, 1:] + grid
    u, v = ends[..., 0], ends[..., 1]
    # Positions relative to the capsule's start keep float32 exact enough.
    x = (column - u[:, :1]).astype(np.float32)[:, None, :]
    y = (row - v[:, :1]).astype(np.float32)[:, :, None]
    du, dv = u[:, 1] - u[:, 0], v[:, 1] - v[:, 0]
    inverse = 1.0 / np.maximum(du * du + dv * dv, 1e-6)

    def per_frame(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32)[:, None, None]

    t = x * per_frame(du * inverse) + y * per_frame(dv * inverse)
    np.clip(t, 0.0, 1.0, out=t)
    ex = x - t * per_frame(du)
    ey = y - t * per_frame(dv)
    r = per_frame(radius[:, 0]) + t * per_frame(radius[:, 1] - radius[:, 0])
    distance = np.sqrt(ex * ex + ey * ey)
    cover = np.clip(r - distance + 0.5, 0.0, 1.0)
    inside = (column >= 0) & (column < size)
    cover *= inside[:, None, :] & ((row >= 0) & (row < size))[:, :, None]
    touched = np.flatnonzero(cover)
    which = touched // (side * side)
    cover, r = cover.ravel()[touched], r.ravel()[touched]
    nx, ny = ex.ravel()[touched] / r, ey.ravel()[touched] / r
    facing = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.0))
    lambert = nx * light[0] - ny * light[1] + facing * light[2]
    shade = 0.42 + 0.5 * np.maximum(lambert, 0.0) + 0.2 * facing
    inside_window = touched % (side * side)
    pixel = (which * size + row[which, inside_window // side]) * size
    pixel += column[which, inside_window % side]
    painted = colours.astype(np.float32)[which] * shade[:, None].astype(np.float32)
    behind = flat[pixel]
    flat[pixel] = behind + cover[:, None] * (painted - behind)
