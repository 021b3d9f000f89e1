"""The command itself: exit status, what is written where, and what is never written."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from rtsp_camera import RtspCamera, encoded
from tiny_videos import bar_video, make_folder, write_video
from untrained import save_model

from ca3d import weights
from ca3d.cli import main
from ca3d.watch import process
from ca3d.watch.calibration import Calibration

SECRET = "S3cr3tWord"


@pytest.fixture
def sure(tmp_path: Path) -> Path:
    """A model that sees `down` in everything."""
    path = save_model(tmp_path / "sure.safetensors")
    model, info = weights.load(path)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    weights.save(path, model, info)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["watch", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_file_gives_events_and_exit_status_0(capsys, sure, clip_file):
    status, out, err = run(capsys, clip_file, "--weights", sure, "--step", "2")
    assert status == 0
    event = json.loads(out)
    assert event["label"] == "down"
    assert event["source"] == str(clip_file)
    # The middles of the first and the last of the windows of 8 frames at 10 a second.
    assert (event["start"], event["end"]) == (0.35, 3.55)
    assert 0.9 < event["confidence"] <= 1
    assert "not a medical or safety device" in err
    assert "trained on nothing at all" in err
    assert "the model sees 32x32 at (0, 0), view center" in err
    assert "network: none; saved: no pictures" in err
    assert "not calibrated" in err
    assert "40 frames" in err
    assert "17 windows" in err


def test_announced_events_come_twice(capsys, sure, clip_file):
    _, out, _ = run(capsys, clip_file, "--weights", sure, "--announce")
    begin, end = map(json.loads, out.splitlines())
    assert begin["end"] is None
    assert end["end"] > begin["start"] == end["start"]


def test_where_no_class_passes_there_is_no_event(capsys, sure, clip_file):
    model, info = weights.load(sure)
    with torch.no_grad():
        model.classifier.bias.zero_()
    weights.save(sure, model, info)
    assert run(capsys, clip_file, "--weights", sure)[:2] == (0, "")


def test_the_events_file_is_private_and_not_overwritten(capsys, sure, clip_file, tmp_path):
    file = tmp_path / "events.jsonl"
    arguments = (clip_file, "--weights", sure, "--events", file)
    assert run(capsys, *arguments)[:2] == (0, "")
    first = file.read_text()
    assert json.loads(first)["label"] == "down"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert "exists already; --force replaces it" in err
    assert file.read_text() == first
    assert run(capsys, *arguments, "--force")[0] == 0
    assert file.read_text() == first
    video = clip_file.read_bytes()
    status, _, err = run(capsys, *arguments[:3], "--events", clip_file, "--force")
    assert (status, "is a video to watch" in err) == (1, True)
    assert clip_file.read_bytes() == video


def test_a_folder_is_watched_file_by_file(capsys, sure, tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "videos" / f"{name}.avi", bar_video("up", 0, 20))
    status, out, _ = run(capsys, tmp_path / "videos", "--weights", sure)
    assert status == 0
    assert [Path(json.loads(line)["source"]).name for line in out.splitlines()] == [
        "a.avi",
        "b.avi",
    ]
    (tmp_path / "videos" / "c.avi").write_bytes(b"RIFF\0\0\0\0AVI LIST" + b"x" * 400)
    status, out, err = run(capsys, tmp_path / "videos", "--weights", sure)
    assert status == 1
    assert len(out.splitlines()) == 2
    assert "left out: " in err
    assert "c.avi: " in err


def test_a_video_shorter_than_a_window_is_told(capsys, sure, tmp_path):
    write_video(tmp_path / "short.avi", bar_video("up", 0, 5))
    status, out, err = run(capsys, tmp_path / "short.avi", "--weights", sure)
    assert (status, out) == (0, "")
    assert "too short for a window of 8 frames" in err


def test_a_source_that_is_too_slow_for_the_model(capsys, tmp_path):
    model = save_model(tmp_path / "fast.safetensors", frames_per_second=25.0)
    write_video(tmp_path / "slow.avi", bar_video("up", 0, 20))
    status, _, err = run(capsys, tmp_path / "slow.avi", "--weights", model)
    assert status == 0
    assert "10 frames/s are too few for this model, which needs at least 16.7" in err
    assert "not one window without a gap" in err


def test_another_view_than_in_training_is_warned_of(capsys, tmp_path, clip_file):
    model = save_model(tmp_path / "m.safetensors", view="letterbox")
    err = run(capsys, clip_file, "--weights", model)[2]
    assert "view letterbox" in err
    assert "warning: the model was trained with view" not in err
    err = run(capsys, clip_file, "--weights", model, "--view", "roi 0,8,16,16")[2]
    assert "warning: the model was trained with view letterbox, not roi 0,8,16,16" in err
    assert "the model sees 16x16 at (0, 8)" in err
    model = save_model(tmp_path / "roi.safetensors", view="roi:0,8,16,16")
    err = run(capsys, clip_file, "--weights", model, "--view", "roi 0,8,16,16")[2]
    assert "warning: the model was trained with view" not in err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.mp4", "no such file"),
        ("http://camera/a", "only rtsp"),
        (f"https://ann:{SECRET}@camera/a", "only rtsp"),
        (f"rtsp:/ann:{SECRET}@camera/a", "no such file"),
        (f"ann:{SECRET}@camera/a", "no such file"),
        (f"rtsp://ann:{SECRET}[x@127.0.0.1:1/a", "belongs into --credentials"),
        ("rtsp:///a", "names no camera"),
        ("concat:a.avi|b.avi", "no such file"),
    ],
)
def test_sources_that_are_not_watched(capsys, model_file, source, said):
    status, out, err = run(capsys, source, "--weights", model_file)
    assert (status, out) == (1, "")
    assert said in err
    assert SECRET not in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--step", "9"), "--step must be 1 to 8"),
        (("--step", "0"), "--step must be at least 1"),
        (("--leave", "0"), "--leave must be above 0"),
        (("--threshold", "1.5"), "--threshold must be"),
        (("--view", "wide"), "--view must be letterbox"),
        (("--keep-days", "3"), "give --save-clips too"),
        (("--timeout", "0"), "--timeout must be"),
        (("--attempts", "-1"), "--attempts must be at least 0"),
    ],
)
def test_bad_options(capsys, model_file, clip_file, options, said):
    status, _, err = run(capsys, clip_file, "--weights", model_file, *options)
    assert status == 1
    assert said in err


def test_a_password_is_shown_nowhere(capsys, model_file, monkeypatch):
    """In the address of a camera that cannot be reached, as PyAV's own message would show it."""
    monkeypatch.setattr("ca3d.watch.feed.BACK_OFF", (0.01,))
    status, out, err = run(
        capsys,
        f"rtsp://ann:{SECRET}@127.0.0.1:1/stream",
        "--weights",
        model_file,
        "--attempts",
        "0",
    )
    assert (status, out) == (1, "")
    assert "rtsp://127.0.0.1:1/stream: nothing listens there" in err
    assert "tried 1 times" in err
    assert "a password in the address can be seen" in err
    assert SECRET not in err
    assert "ann" not in err.replace("channel", "")


def test_not_even_by_a_decoder_that_dies(capsys, model_file, monkeypatch):
    code = f"import sys; sys.stdin.readline(); sys.exit('rtsp://ann:{SECRET}@camera/a')"
    real = process.subprocess.Popen
    monkeypatch.setattr(
        process.subprocess, "Popen", lambda command, **kw: real([sys.executable, "-c", code], **kw)
    )
    status, _, err = run(
        capsys,
        f"rtsp://ann:{SECRET}@127.0.0.1:1/a",
        "--weights",
        model_file,
        "--attempts",
        "0",
    )
    assert status == 1
    assert "the decoder died (exit status 1): rtsp://***@camera/a" in err
    assert SECRET not in err


def test_a_camera_by_its_credentials_file(capsys, sure, tmp_path):
    file = tmp_path / "camera.txt"
    file.write_text(f"ann:{SECRET}\n")
    file.chmod(0o600)
    with RtspCamera(encoded(bar_video("up", 0, 30)), user_password=f"ann:{SECRET}") as camera:
        arguments = (camera.url, "--weights", sure, "--attempts", "0", "--credentials", file)
        status, out, err = run(capsys, *arguments, "--queue", "100")
        assert status == 1
        assert "the stream ended; tried 1 times: giving up" in err
        event = json.loads(out)
        assert event["label"] == "down"
        assert event["source"] == camera.url
        assert event["time"][:2] == "20"
        assert "network: the camera only" in err
        file.write_text("ann:wrong")
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert "refuses the user name or password" in err


def test_saved_clips_are_private(capsys, sure, clip_file, tmp_path):
    folder = tmp_path / "clips"
    status, out, err = run(capsys, clip_file, "--weights", sure, "--save-clips", folder)
    assert status == 0
    (clip,) = folder.iterdir()
    assert json.loads(out)["clip"] == str(clip)
    assert stat.S_IMODE(clip.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert f"clips of events in {folder}" in err
    from ca3d.data.reader import open_video

    with open_video(clip) as video:
        assert (video.width, video.height) == (32, 32)
        assert video.frames_per_second == pytest.approx(10)
        assert video.num_frames > 30


def test_nothing_is_left_on_the_disk_without_it(capsys, sure, clip_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(os.listdir(tmp_path))
    assert run(capsys, clip_file, "--weights", sure)[0] == 0
    assert set(os.listdir(tmp_path)) == before


def test_statistics(capsys, sure, clip_file):
    err = run(capsys, clip_file, "--weights", sure, "--realtime", "--stats", "--queue", "60")[2]
    last = err.strip().splitlines()[-1]
    assert "40 frames" in last
    assert "dropped 0" in last
    assert "memory" in last


def test_calibrate_stores_in_the_weights_only_what_it_measured(capsys, tmp_path):
    data = make_folder(tmp_path / "bars", ("background", "down", "up"), 4)
    model = save_model(tmp_path / "m.safetensors", extra={"epoch": 3})
    before = weights.load(model)[0].state_dict()
    assert main(["calibrate", str(model), str(data), "--split", "all", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "12 videos of bars, all" in out
    after, info = weights.load(model)
    assert all(torch.equal(before[k], v) for k, v in after.state_dict().items())
    assert info.extra["epoch"] == 3
    calibration = Calibration.of_extra(info.extra, 3)
    assert calibration.measured_on == "bars, all"
    again = ["calibrate", str(model), str(data), "--split", "all", "--workers", "0"]
    assert main(again) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert main([*again, "--force"]) == 0
    video = data / "up" / "00.avi"
    assert main(["watch", str(video), "--weights", str(model)]) == 0
    assert "calibrated on bars, all" in capsys.readouterr().err


def test_training_stores_the_view(capsys, tmp_path):
    from tiny_videos import TINY, flags

    data = make_folder(tmp_path / "bars", ("background", "down"), 4)
    options = flags({**TINY, "epochs": 1, "view": "letterbox", "val_fraction": 0.25})
    out = tmp_path / "run"
    arguments = ["train", str(data), "--out", str(out), *options, "--test-fraction", "0.25"]
    assert main(arguments) == 0
    assert "class background: learnt as any other class" in capsys.readouterr().out
    info = weights.load_info(out / "best.safetensors")
    assert info.view == "letterbox"
    assert info.classes == ("background", "down")
