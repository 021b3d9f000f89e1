import json
from pathlib import Path

import numpy as np
import pytest

from ca3d.data.embedded.motions import MOTION_FILE, Motion, Poses, load_motions
from ca3d.data.embedded.skeleton import forward_kinematics

MOTIONS = load_motions()


def test_fifteen_motions_of_known_length() -> None:
    assert len(MOTIONS) == 15
    assert list(MOTIONS) == sorted(MOTIONS)
    durations = [motion.duration for motion in MOTIONS.values()]
    assert min(durations) == pytest.approx(0.8, abs=0.01)
    assert max(durations) == pytest.approx(4.42, abs=0.01)
    assert sum(len(motion.poses) for motion in MOTIONS.values()) == 1620
    assert {m.name for m in MOTIONS.values() if not m.cyclic} == {
        "getup_facedown",
        "getup_faceup",
        "kick",
        "punch",
    }


def test_file_is_small_and_has_its_notice() -> None:
    assert MOTION_FILE.stat().st_size < 200_000
    notice = MOTION_FILE.with_name("NOTICE.txt").read_text()
    for word in ("pybullet", "DeepMimic", "zlib", "altered version"):
        assert word in notice


@pytest.mark.parametrize("name", MOTIONS)
def test_stored_poses_are_valid(name: str) -> None:
    poses = MOTIONS[name].poses
    np.testing.assert_allclose(np.linalg.norm(poses.rotation, axis=-1), 1.0, atol=1e-12)
    assert (np.diff(MOTIONS[name].seconds) > 0).all()
    # Signs are continuous, so neighbouring quaternions never point away from each other.
    assert ((poses.rotation[1:] * poses.rotation[:-1]).sum(-1) > 0).all()


@pytest.mark.parametrize("name", MOTIONS)
def test_recorded_times_give_recorded_poses(name: str) -> None:
    motion = MOTIONS[name]
    blend = 0.2 if motion.cyclic else 0.0
    lead = 0.0 if motion.cyclic else 0.1
    inside = (motion.seconds > blend) & (motion.seconds < motion.duration - blend)
    poses = motion.at(motion.seconds[inside] + lead)
    # Joints rather than quaternions: q and -q are the same rotation.
    recorded = forward_kinematics(motion.poses[inside])
    np.testing.assert_allclose(forward_kinematics(poses), recorded, atol=1e-9)


@pytest.mark.parametrize("name", MOTIONS)
def test_playback_repeats_and_never_jumps(name: str) -> None:
    motion = MOTIONS[name]
    seconds = np.linspace(-1.3 * motion.period, 2.4 * motion.period, 4001)
    poses, later = motion.at(seconds), motion.at(seconds + motion.period)
    np.testing.assert_allclose(later.hinge, poses.hinge, atol=1e-6)
    np.testing.assert_allclose(np.abs((later.rotation * poses.rotation).sum(-1)), 1.0, atol=1e-9)
    travel = later.root - poses.root
    np.testing.assert_allclose(travel, np.broadcast_to(travel[0], travel.shape), atol=1e-6)
    assert abs(travel[0, 1]) < 1e-6
    step = seconds[1] - seconds[0]
    # No seam moves the pelvis faster than 9 m/s or turns a joint faster than 40 rad/s.
    assert np.abs(np.diff(poses.root, axis=0)).max() < 9 * step
    cosine = np.abs((poses.rotation[1:] * poses.rotation[:-1]).sum(-1))
    assert (2 * np.arccos(np.minimum(cosine, 1.0))).max() < 40 * step + 1e-4


def test_round_trip_of_the_array_file(tmp_path: Path) -> None:
    """The script that made the file reproduces its numbers from a source file to 16 bits."""
    from importlib.util import module_from_spec, spec_from_file_location

    script = Path(__file__).parents[4] / "scripts/extract_mocap.py"
    spec = spec_from_file_location("extract_mocap", script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(9, 44))
    rows[:, 0] = 0.02
    column = 4
    for _, width in module.ROW_JOINTS:
        if width == 1:
            rows[:, column] = np.clip(rows[:, column], -3, 3)
        column += width
    source = {"Loop": "wrap", "Frames": rows.tolist()}
    (tmp_path / "humanoid3d_test_case.txt").write_text(json.dumps(source))
    module.extract(tmp_path, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert file["names"].tolist() == ["test_case"]
        assert file["loops"].tolist() == [True]
        np.testing.assert_allclose(file["seconds"], np.arange(9) * 0.02, atol=1e-6)
        root = rows[:, 1:4] - [rows[0, 1], 0, rows[0, 3]]
        np.testing.assert_allclose(file["root"] * (4 / 32767), root, atol=6.2e-5)
        first = rows[:, 4:8] / np.linalg.norm(rows[:, 4:8], axis=1, keepdims=True)
        stored = file["rotation"][:, 0] / 32767
        np.testing.assert_allclose(np.abs((stored * first).sum(1)), 1.0, atol=1e-4)


def test_blend_takes_the_short_way() -> None:
    rotation = np.zeros((2, 9, 4))
    rotation[0, :, 0], rotation[1, :, 0] = 1.0, -1.0
    poses = Poses(np.zeros((2, 3)), rotation, np.zeros((2, 4)))
    motion = Motion("still", np.array([0.0, 1.0]), poses, cyclic=False)
    middle = motion.at(np.array([0.6]))
    np.testing.assert_allclose(np.abs(middle.rotation[..., 0]), 1.0)
