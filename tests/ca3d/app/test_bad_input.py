"""Every mistake of the user's is one clear line and the right exit code."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_videos import TINY, flags, make_folder

from ca3d.cli import main
from ca3d.errors import UserError


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command that must fail; returns its exit code and the line it printed."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as left:
        code = int(left.code or 0)
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line]
    assert "Traceback" not in errors
    assert lines[-1].startswith("ca3d"), errors
    assert len([line for line in lines if line.startswith("ca3d")]) == 1
    return code, lines[-1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fly"], "fly"),
        (["train"], "DATA must be given"),
        (["train", "d", "--lr", "quick"], "--lr must be a number, not quick (see"),
        (["train", "d", "--lr", "nan"], "--lr must be a number, not nan (see"),
        (["train", "d", "--lr", ".nan"], "--lr must be a number, not nan (see"),
        (["train", "d", "--clip-norm", "nan"], "--clip-norm must be a number, not nan (see"),
        (["train", "d", "--max-steps", "nan"], "--max-steps must be a whole number, not nan (see"),
        (["train", "d", "--mean", "0", "nan", "0"], "--mean must be a number, not nan (see"),
        (["train", "d", "--flip", "maybe"], "--flip must be true or false, not maybe (see"),
        (["data", "split", "d", "--val", ".nan"], "--val must be a number, not nan (see"),
        (["compare", "d", "--budget-hours", ".nan"], "--budget-hours must be a number, not nan"),
        (["train", "d", "--lr", "inf"], "--lr"),
        (["train", "d", "--epochs", "1.5"], "--epochs"),
        (
            ["train", "d", "--schedule", "linear"],
            "one of published, cosine, onecycle, constant, not",
        ),
        (["train", "d", "--mean", "0.5"], "--mean"),
        (["train", "d", "--colour", "red"], "--colour"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["eval", "w"], "DATA must be given"),
        (["eval", "w", "d", "--crops", "2"], "--crops"),
        (["predict", "v.mp4"], "--weights must be given"),
        (["predict", "v.mp4", "--weights", "w", "--top-k", "many"], "--top-k"),
        (["convert", "in.pt"], "--out must be given"),
        (["data"], "action"),
        (["data", "make", "mocap30"], "OUT must be given"),
        (["data", "make", "mocap30", "o", "--size", "huge"], "--size"),
        (["data", "make", "mocap30", "o", "--segments", "5"], "one of 2, 3, not 5"),
        (["demo", "--workers", "x"], "--workers"),
    ],
)
def test_wrong_usage(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(words, capsys)
    assert code == 2
    assert part in line.replace("'", "")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "missing"], "missing: no such folder"),
        (["train", "missing", "--lr", "-1"], "--lr must be"),
        (["train", "missing", "--precision", "float7"], "float7"),
        (["train", "missing", "--device", "toaster"], "toaster"),
        (["train", "missing", "--batch-size", "1"], "--batch-size"),
        (["eval", "missing.safetensors", "d"], "missing.safetensors: no such file"),
        (["eval", "missing.safetensors", "d", "--clips", "0"], "--clips must be at least 1"),
        (["predict", "missing.mp4", "--weights", "w"], "missing.mp4: no such file"),
        (["predict", "missing.mp4", "--weights", "w", "--overlap", "1"], "--overlap"),
        (["convert", "missing.pt", "--out", "o"], "missing.pt: no such file"),
        (["data", "make", "mocap31", "o"], "mocap31"),
        (["data", "make", "mocap30", "o", "--clutter", "2"], "clutter"),
        (["data", "make", "mocap15", "o", "--segments", "3"], "segments is for motion-order"),
        (["data", "make", "motion-order", "o", "--views", "all"], "views is for the mocap sets"),
        (["train", "missing", "--freeze", "nothing"], "matches no parameter"),
        (["train", "missing", "--init-from", "w.safetensors"], "w.safetensors: no such file"),
        (["train", "missing", "--freeze", "nothing", "--model", "x3d_tiny"], "no parameter"),
        (["train", "missing", "--schedule", "constant", "--milestones", "3"], "--milestones"),
        (["data", "check", "missing"], "missing: no such folder"),
        (["data", "check", "missing", "--workers", "0"], "workers"),
        (["data", "cache", "missing"], "missing: no such folder"),
        (["data", "split", "missing"], "missing: no such folder"),
        (["data", "split", "missing", "--val", "0.9", "--test", "0.2"], "--val"),
        (["info", "missing"], "missing: no such file or folder"),
        (["demo", "--workers", "0"], "--workers"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--clutter", "1.5"], "--clutter"),
    ],
)
def test_values_that_cannot_be(
    words: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = fails(words, capsys)
    assert code == 1
    assert part in line


def test_missing_tensorboard_is_noticed_before_data_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, line = fails(["train", "missing", "--tensorboard"], capsys)
    assert (code, "pip install tensorboard" in line) == (1, True)


def test_folders_that_hold_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    code, line = fails(["train", str(tmp_path / "empty"), "--out", out], capsys)
    assert (code, "no class folders" in line) == (1, True)
    one = make_folder(tmp_path / "one", classes=("up",), videos=3)
    code, line = fails(["train", str(one), "--out", out, *flags(TINY)], capsys)
    assert code == 1
    assert "'up'" in line
    plain = make_folder(tmp_path / "plain", videos=5)
    code, line = fails(["train", str(plain), "--out", out, *flags(TINY), "--group", "("], capsys)
    assert (code, "no regular expression" in line) == (1, True)
    (tmp_path / "hollow" / "up").mkdir(parents=True)
    code, line = fails(["train", str(tmp_path / "hollow"), "--out", out], capsys)
    assert (code, "without videos" in line) == (1, True)
    code, line = fails(["train", __file__, "--out", out], capsys)
    assert (code, "is a file" in line) == (1, True)
    # None of these tries may be in the way of the next.
    data = make_folder(tmp_path / "good", videos=6)
    assert main(["train", str(data), "--out", out, *flags({**TINY, "max_steps": 1})]) == 0


def test_videos_that_are_all_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", videos=4)
    for video in data.glob("*/*.avi"):
        video.write_bytes(b"nothing")
    code, line = fails(["train", str(data), "--out", str(tmp_path / "run"), *flags(TINY)], capsys)
    assert code == 1
    assert "read" in line


def test_train_names_what_is_wrong_with_its_options(
    bars: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = flags(TINY)
    start = ["train", str(bars), "--out", str(tmp_path / "run"), *tiny]
    for words, part in (
        (["--model", "ca3d_tinny"], "did you mean 'ca3d_tiny'"),
        (["--model-options.depth", "3"], "depth"),
        (["--init-from", "missing.safetensors"], "missing.safetensors: no such file"),
        (["--init-from", str(bars / "up" / "00.avi")], "00.avi"),
        (["--init-from", str(trained), "--model-options.widths", "[8,8,8,8]"], "does not fit"),
        (["--freeze", "nothing"], "matches no parameter"),
        (["--freeze", "("], "no regular expression"),
        (["--train-list", "missing.csv"], "missing.csv"),
        (["--val-list", "a.csv"], "need --train-list"),
        (["--frames", "3"], "frames"),
        (["--device", "cuda:7"], "cuda:7"),
        *([] if find_spec("tensorboard") else [(["--tensorboard"], "pip install tensorboard")]),
    ):
        code, line = fails([*start, *words], capsys)
        assert code == 1, (words, line)
        assert part in line, (words, line)


def test_an_existing_run_is_left_alone(
    bars: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["train", str(bars), "--out", str(trained), *flags(TINY)]
    code, line = fails(start, capsys)
    assert (code, "--resume auto" in line) == (1, True)
    code, line = fails([*start, "--resume", "auto", "--lr", "0.5"], capsys)
    assert (code, "--lr was 0.01, is 0.5" in line) == (1, True)


def test_weights_that_are_none(
    bars: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(bars / "up" / "00.avi")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a tensor in sight")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((trained / "best.safetensors").read_bytes()[:-1000])
    for file in (foreign, torn):
        for words in (["predict", video, "--weights", str(file)], ["eval", str(file), str(bars)]):
            code, line = fails(words, capsys)
            assert (code, file.name in line) == (1, True)
    code, line = fails(["predict", video, "--weights", str(tmp_path)], capsys)
    assert (code, "no best.safetensors" in line) == (1, True)


def test_classes_that_the_model_does_not_know(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_folder(tmp_path / "other", classes=("down", "upstairs"), videos=2)
    code, line = fails(["eval", str(trained), str(other), "--split", "all"], capsys)
    assert (code, "upstairs" in line) == (1, True)


def test_split_that_is_not_there(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_folder(tmp_path / "plain", videos=2)
    code, line = fails(["eval", str(trained), str(plain)], capsys)
    assert (code, "no split 'test'" in line) == (1, True)


def test_videos_that_cannot_be_read(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.avi").write_text("just text")
    for name in ("empty.mp4", "text.avi"):
        words = ["predict", str(tmp_path / name), "--weights", str(trained)]
        code, line = fails(words, capsys)
        assert (code, name in line) == (1, True)
    code, line = fails(["predict", str(tmp_path), "--weights", str(trained)], capsys)
    assert (code, "none of the 2 videos" in line) == (1, True)
    (tmp_path / "none").mkdir()
    code, line = fails(["predict", str(tmp_path / "none"), "--weights", str(trained)], capsys)
    assert (code, "no video" in line) == (1, True)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "missing", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_called_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ca3d.cli import first_commands as commands

    def broken(config: object) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(commands, "info", broken)
    assert main(["info"]) == 1
    assert "this is a bug (RuntimeError)" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ca3d.cli import first_commands as commands

    def lacking(config: object) -> None:
        raise ModuleNotFoundError("No module named 'av'", name="av")

    monkeypatch.setattr(commands, "info", lacking)
    assert main(["info"]) == 1
    assert 'av is missing; run: pip install "ca3d-kernels[app]"' in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_any_command(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ca3d.cli import first_commands as commands

    def interrupted(config: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(commands, "info", interrupted)
    assert main(["info"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_user_errors_of_the_library_are_the_same(bars: Path, trained: Path, tmp_path: Path) -> None:
    import ca3d

    predictor = ca3d.load(trained)
    with pytest.raises(UserError, match=r"missing.mp4"):
        predictor.predict(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="top_k"):
        predictor.predict(bars / "up" / "00.avi", top_k=0)
    with pytest.raises(ValueError, match="overlap"):
        predictor.predict(bars / "up" / "00.avi", overlap=1.0)
