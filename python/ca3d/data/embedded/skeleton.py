"""Forward kinematics of the motion-capture skeleton, with variable proportions."""

from dataclasses import dataclass

import numpy as np

from ca3d.data.embedded.motions import Poses

# name -> (parent, offset in the parent's frame in metres, which rotation: index of Poses.rotation,
# or -1 - index of Poses.hinge, or None for an end point, which length scale applies)
_SKELETON: tuple[tuple[str, str | None, tuple[float, float, float], int | None, str], ...] = (
    ("pelvis", None, (0.0, 0.0, 0.0), 0, "torso"),
    ("chest", "pelvis", (0.0, 0.236151, 0.0), 1, "torso"),
    ("neck", "chest", (0.0, 0.223894, 0.0), 2, "torso"),
    ("head", "neck", (0.0, 0.175, 0.0), None, "torso"),
    ("crown", "neck", (-0.04, 0.2, 0.0), None, "torso"),
    ("right_hip", "pelvis", (0.0, 0.0, 0.084887), 3, "torso"),
    ("right_knee", "right_hip", (0.0, -0.421546, 0.0), -1, "leg"),
    ("right_ankle", "right_knee", (0.0, -0.40987, 0.0), 4, "leg"),
    ("right_toe", "right_ankle", (0.17, -0.0225, 0.0), None, "torso"),
    ("right_shoulder", "chest", (-0.02405, 0.2435, 0.18311), 5, "torso"),
    ("right_elbow", "right_shoulder", (0.0, -0.274788, 0.0), -2, "arm"),
    ("right_wrist", "right_elbow", (0.0, -0.258947, 0.0), None, "arm"),
    ("left_hip", "pelvis", (0.0, 0.0, -0.084887), 6, "torso"),
    ("left_knee", "left_hip", (0.0, -0.421546, 0.0), -3, "leg"),
    ("left_ankle", "left_knee", (0.0, -0.40987, 0.0), 7, "leg"),
    ("left_toe", "left_ankle", (0.17, -0.0225, 0.0), None, "torso"),
    ("left_shoulder", "chest", (-0.02405, 0.2435, -0.18311), 8, "torso"),
    ("left_elbow", "left_shoulder", (0.0, -0.274788, 0.0), -4, "arm"),
    ("left_wrist", "left_elbow", (0.0, -0.258947, 0.0), None, "arm"),
)
JOINTS = tuple(entry[0] for entry in _SKELETON)
JOINT_INDEX = {name: i for i, name in enumerate(JOINTS)}
PARENTS = tuple(-1 if entry[1] is None else JOINT_INDEX[entry[1]] for entry in _SKELETON)


@dataclass(frozen=True)
class Proportions:
    """Lengths of a body relative to the recorded performer's.

    Attributes:
        leg: thighs and shins.
        arm: upper and lower arms.
        torso: everything else.
    """

    leg: float = 1.0
    arm: float = 1.0
    torso: float = 1.0


def bone_lengths(proportions: Proportions) -> np.ndarray:
    """Distance of each joint from its parent.

    Args:
        proportions: the body.

    Returns:
        (19,) metres, in the order of `JOINTS`; 0 for the pelvis.

    Example:
        >>> float(bone_lengths(Proportions(leg=2.0))[JOINT_INDEX["left_knee"]].round(3))
        0.843
    """
    return np.array(
        [np.linalg.norm(offset) * getattr(proportions, part) for _, _, offset, _, part in _SKELETON]
    )


def forward_kinematics(poses: Poses, proportions: Proportions | None = None) -> np.ndarray:
    """Joint positions of poses: p_j = p_parent + R_parent o_j, R_j = R_parent Q_j.

    Args:
        poses: N poses.
        proportions: the body; None for the recorded performer.

    Returns:
        (N, 19, 3) metres, in the order of `JOINTS`; x ahead, y up, z to the right. The travelled
        distance scales with the legs, as it does for a shorter or taller walker.

    Example:
        >>> from ca3d.data.embedded.motions import load_motions
        >>> forward_kinematics(load_motions()["walk"].poses).shape
        (39, 19, 3)
    """
    body = proportions or Proportions()
    balls = _matrices(poses.rotation)
    hinges = _hinge_matrices(poses.hinge)
    positions = np.empty((len(poses), len(_SKELETON), 3))
    frames: list[np.ndarray] = []
    for joint, (_, _, offset, rotation, part) in enumerate(_SKELETON):
        parent = PARENTS[joint]
        if rotation is None:
            local = np.broadcast_to(np.eye(3), (len(poses), 3, 3))
        else:
            local = balls[:, rotation] if rotation >= 0 else hinges[:, -1 - rotation]
        if parent < 0:
            positions[:, joint] = poses.root * body.leg
            frames.append(local)
            continue
        scaled = np.asarray(offset) * getattr(body, part)
        positions[:, joint] = positions[:, parent] + frames[parent] @ scaled
        frames.append(frames[parent] @ local)
    return positions


def _matrices(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of unit quaternions (..., 4)."""
    w, x, y, z = np.moveaxis(quaternions, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _hinge_matrices(angles: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) about z, the axis of knees and elbows."""
    matrices = np.zeros((*angles.shape, 3, 3))
    matrices[..., 0, 0] = matrices[..., 1, 1] = np.cos(angles)
    matrices[..., 1, 0] = np.sin(angles)
    matrices[..., 0, 1] = -matrices[..., 1, 0]
    matrices[..., 2, 2] = 1.0
    return matrices
