import numpy as np
import pytest

from ca3d.data.embedded.motions import load_motions
from ca3d.data.embedded.skeleton import (
    JOINT_INDEX,
    PARENTS,
    Proportions,
    bone_lengths,
    forward_kinematics,
)


@pytest.mark.parametrize("name", load_motions())
@pytest.mark.parametrize("body", [Proportions(), Proportions(leg=1.1, arm=0.9, torso=1.05)])
def test_bone_lengths_are_constant(name: str, body: Proportions) -> None:
    joints = forward_kinematics(load_motions()[name].poses, body)
    bones = joints[:, 1:] - joints[:, list(PARENTS[1:])]
    lengths = np.linalg.norm(bones, axis=-1)
    np.testing.assert_allclose(
        lengths, np.broadcast_to(bone_lengths(body)[1:], lengths.shape), rtol=1e-9
    )


def test_resting_pose_stands_upright() -> None:
    """All rotations zero: a person of about 1.7 m who looks along x, right side at +z."""
    poses = load_motions()["walk"].poses[:1]
    poses.rotation[:] = [1, 0, 0, 0]
    poses.hinge[:] = 0
    joints = forward_kinematics(poses)[0]
    height = joints[JOINT_INDEX["head"], 1] - joints[JOINT_INDEX["left_ankle"], 1]
    assert height == pytest.approx(0.236151 + 0.223894 + 0.175 + 0.421546 + 0.40987, abs=1e-9)
    assert joints[JOINT_INDEX["right_hip"], 2] > joints[JOINT_INDEX["left_hip"], 2]
    assert joints[JOINT_INDEX["right_toe"], 0] > joints[JOINT_INDEX["right_ankle"], 0]


def test_root_rotation_turns_the_whole_body() -> None:
    poses = load_motions()["dance_a"].poses[:3]
    joints = forward_kinematics(poses)
    half = np.sqrt(0.5)
    w, x, y, z = np.moveaxis(poses.rotation[:, 0].copy(), -1, 0)
    # A quarter turn about the vertical axis, applied after the root's rotation.
    poses.rotation[:, 0] = np.stack(
        [half * (w - y), half * (x + z), half * (y + w), half * (z - x)], -1
    )
    turned = forward_kinematics(poses)
    body, other = joints - joints[:, :1], turned - turned[:, :1]
    np.testing.assert_allclose(other[..., 1], body[..., 1], atol=1e-9)
    np.testing.assert_allclose(other[..., 0], body[..., 2], atol=1e-9)
    np.testing.assert_allclose(other[..., 2], -body[..., 0], atol=1e-9)


def test_longer_legs_walk_further() -> None:
    poses = load_motions()["walk"].poses
    near, far = forward_kinematics(poses), forward_kinematics(poses, Proportions(leg=1.1))
    np.testing.assert_allclose(far[:, 0], 1.1 * near[:, 0], atol=1e-9)
