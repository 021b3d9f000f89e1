import numpy as np
import pytest

from ca3d.data.embedded.figure import (
    TARGET_HEIGHT,
    Camera,
    Look,
    draw_figure,
    draw_shadow,
    lowest_point,
)
from ca3d.data.embedded.motions import load_motions
from ca3d.data.embedded.skeleton import JOINT_INDEX, forward_kinematics

CAMERA = Camera(yaw=0.0, pitch=0.3, distance=5.0, scale=25.0, center=(32.0, 36.0), size=64)
GREY = np.full(3, 0.5)
LOOK = Look(GREY, GREY, GREY, GREY, GREY, 1.0, np.array([0.0, 0.8, 0.6]))
RED = np.array([1.0, 0.0, 0.0])


def stand(at: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    joints = forward_kinematics(load_motions()["walk"].poses[:1])
    joints[..., 1] -= lowest_point(joints, 1.0)[:, None]
    joints[..., 0] += at[0] - joints[:, :1, 0]
    joints[..., 2] += at[1] - joints[:, :1, 2]
    return joints


def draw(joints: np.ndarray, camera: Camera = CAMERA, look: Look = LOOK) -> np.ndarray:
    picture = np.zeros((len(joints), camera.size, camera.size, 3), dtype=np.float32)
    draw_figure(picture, joints, np.zeros((len(joints), 2)), camera, look)
    return picture


@pytest.mark.parametrize("yaw", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("pitch", [0.1, 0.5])
def test_ground_inverts_projection(yaw: float, pitch: float) -> None:
    camera = Camera(yaw, pitch, 5.0, 25.0, (32.0, 36.0), 64)
    position, depth = camera.ground()
    row, column = np.nonzero(np.isfinite(depth) & (depth < 30))
    points = np.zeros((1, len(row), 3))
    points[0, :, 0], points[0, :, 2] = position[row, column].T
    pixels = camera.project(points, np.zeros((1, 2)))[0]
    np.testing.assert_allclose(pixels[:, 0], column, atol=1e-6)
    np.testing.assert_allclose(pixels[:, 1], row, atol=1e-6)
    np.testing.assert_allclose(pixels[:, 2], depth[row, column])


def test_target_falls_on_the_center() -> None:
    target = np.array([[3.0, -2.0]])
    pixel = CAMERA.project(np.array([[[3.0, TARGET_HEIGHT, -2.0]]]), target)
    np.testing.assert_allclose(pixel[0, 0], [32.0, 36.0, 5.0])


def test_figure_is_where_its_joints_are() -> None:
    joints = stand()
    picture = draw(joints)
    pixels = CAMERA.project(joints, np.zeros((1, 2)))[0]
    for joint in ("head", "chest", "pelvis", "left_knee", "right_wrist"):
        u, v = pixels[JOINT_INDEX[joint], :2].round().astype(int)
        assert picture[0, v, u].max() > 0.15, joint
    rows, columns = np.nonzero(picture[0].max(-1) > 0.05)
    assert rows.min() >= pixels[:, 1].min() - 5
    assert rows.max() <= pixels[:, 1].max() + 3
    assert columns.min() >= pixels[:, 0].min() - 5
    assert columns.max() <= pixels[:, 0].max() + 5


def test_edges_are_anti_aliased() -> None:
    """A sixteenth of a pixel's step changes the picture a little, and evenly in both directions."""
    joints = np.concatenate([stand((x / 16 / 25, 0.0)) for x in range(17)])
    pictures = draw(joints)
    change = np.abs(np.diff(pictures, axis=0)).sum((1, 2, 3))
    whole = np.abs(pictures[16] - pictures[0]).sum()
    assert change.max() < 0.2 * whole
    # A whole pixel to the right is a shifted picture, but for perspective.
    np.testing.assert_allclose(pictures[16][:, 1:], pictures[0][:, :-1], atol=0.08)


def test_near_limbs_hide_far_ones() -> None:
    """From the right side the right thigh hides the left one, and the other way round."""
    joints = stand()
    names = ("hip", "knee", "ankle", "toe")
    for name in names:
        left, right = JOINT_INDEX[f"left_{name}"], JOINT_INDEX[f"right_{name}"]
        joints[:, left, :2] = joints[:, right, :2]
    base = Camera(0.0, 0.0, 5.0, 25.0, (32.0, 36.0), 64)
    other = Camera(np.pi, 0.0, 5.0, 25.0, (32.0, 36.0), 64)
    middle = joints[:, [JOINT_INDEX["right_hip"], JOINT_INDEX["right_knee"]]].mean(1, keepdims=True)
    values = []
    for camera in (base, other):
        u, v = camera.project(middle, np.zeros((1, 2)))[0, 0, :2].round().astype(int)
        values.append(float(draw(joints, camera)[0, v, u, 0]))
    # Left limbs are 12 % darker; at yaw 0 the camera stands on the right side (+z).
    assert values[1] < 0.97 * values[0]


def test_shadow_lies_under_the_feet_and_fades_with_height() -> None:
    standing = stand()
    flying = standing + np.array([0.0, 1.0, 0.0])
    joints = np.concatenate([standing, flying])
    light = draw_shadow(joints, np.zeros((2, 2)), CAMERA, LOOK, 0.5)
    assert light.shape == (2, 64, 64)
    assert light.max() <= 1.0
    assert light.min() >= 0.5
    foot = CAMERA.project(standing * [1, 0, 1], np.zeros((1, 2)))[0, JOINT_INDEX["left_ankle"]]
    u, v = foot[:2].round().astype(int)
    assert light[0, v, u] < 0.75
    assert light[1].min() > light[0].min()
    assert light[:, 0].min() == 1.0


def test_figures_outside_the_picture_are_harmless() -> None:
    assert draw(stand((50.0, 0.0))).max() == 0.0
    assert draw(stand((0.0, -4.9))).shape == (1, 64, 64, 3)


def test_light_side_is_brighter() -> None:
    light = np.array([0.8, 0.36, 0.48])
    look = Look(RED, RED, RED, RED, RED, 1.0, light / np.linalg.norm(light))
    picture = draw(stand(), look=look)[0, :, :, 0]
    row = picture[int(CAMERA.project(stand(), np.zeros((1, 2)))[0, JOINT_INDEX["chest"], 1])]
    inside = np.flatnonzero(row > 0.3)
    middle = (inside[0] + inside[-1]) // 2
    assert row[middle + 1 : inside[-1] + 1].mean() > row[inside[0] : middle].mean()
