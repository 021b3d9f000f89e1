"""What every command prints and leaves behind."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_videos import TINY, flags, make_folder

from ca3d import models, weights
from ca3d.cli import COMMANDS, main, parse
from ca3d.models.published import entries
from ca3d.training import TrainConfig
from ca3d.weights import load_info


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_explains_every_option(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(command, type(COMMANDS[0]))
    with pytest.raises(SystemExit) as left:
        main([*command.name.split(), "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "Optional[" not in text
    assert "<class" not in text
    for example in command.examples:
        assert example in text


def test_examples_in_the_help_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("data: my_videos\nepochs: 7\n")
    for command in COMMANDS:
        for example in command.examples:
            words = shlex.split(example.split(" > ")[0])
            found, config = parse(words[words.index("ca3d") + 1 :])
            assert found == command
            if "config.yaml" in example:
                assert (config.data, config.epochs, config.lr) == ("my_videos", 7, 0.005)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom ca3d.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\nassert 'numpy' not in sys.modules"
    )
    for words in (["--help"], ["train", "--help"], ["predict", "--help"], ["demo", "--help"]):
        assert "usage: ca3d" in python("-c", code, *words)


def test_threads_sleep_while_they_wait_in_training_alone() -> None:
    code = (
        "import os, sys\nos.environ.pop('OMP_WAIT_POLICY', None)\nfrom ca3d.cli import main\n"
        "main([*sys.argv[1:], 'missing'])\nprint(os.environ.get('OMP_WAIT_POLICY'))"
    )
    assert python("-c", code, "train").endswith("PASSIVE\n")
    assert python("-c", code, "info").endswith("None\n")


def test_importing_the_package_is_cheap() -> None:
    python("-c", "import ca3d, sys; assert 'torch' not in sys.modules; ca3d.load")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: ca3d" in capsys.readouterr().out


def test_module_is_the_command() -> None:
    assert python("-m", "ca3d", "--version").startswith("ca3d ")


def test_flags_override_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    options = {"data": "videos", "lr": 0.5, "epochs": 3, "mean": [0.1, 0.2, 0.3]}
    file.write_text(yaml.safe_dump(options))
    _, config = parse(["train", "--config", str(file), "--epochs", "4"])
    assert (config.data, config.lr, config.epochs) == ("videos", 0.5, 4)
    assert config.mean == [0.1, 0.2, 0.3]
    _, config = parse(["train", "others", "--config", str(file)])
    assert config.data == "others"


def test_printed_configuration_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "videos", "--lr", "0.3", "--model-options.pool=published", "--freeze-bn"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--print_config"])
    assert left.value.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(["train", "--config", str(file)])[1] == parse(words)[1]


def test_flags_override_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("freeze_bn: true\nlr: 1e-3\n")
    words = ["train", "d", "--config", str(file)]
    assert parse(words)[1] == TrainConfig(data="d", lr=1e-3, freeze_bn=True)
    changed = TrainConfig(data="d", lr=0.5, freeze_bn=False)
    assert parse([*words, "--no-freeze-bn", "--lr", "0.5"])[1] == changed


def test_underscores_are_as_good_as_dashes() -> None:
    assert parse(["train", "d", "--batch_size=7", "--init_from", "a_b"])[1] == TrainConfig(
        data="d", batch_size=7, init_from="a_b"
    )


def test_configuration_of_a_run_starts_the_same_run(
    bars: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    assert main(["train", "--config", str(trained / "config.yaml"), "--out", str(out)]) == 0
    ours, theirs = load_file(out / "last.safetensors"), load_file(trained / "last.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_train_says_where_everything_is(
    bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", str(bars), "--out", str(out), *flags({**TINY, "log_steps": 1})]) == 0
    text = capsys.readouterr().out
    for part in ("flip", "parameters", "clips/s", "waiting for data", "val loss", "top-1"):
        assert part in text
    assert f"ca3d predict VIDEO --weights {out / 'best.safetensors'}" in text


def test_train_says_that_split_files_leave_nothing_to_group(
    bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = flags({**TINY, "max_steps": 1, "progress": "plain"})
    out = str(tmp_path / "run")
    assert main(["train", str(bars), "--out", out, "--group", "(.)", *options]) == 0
    assert "--group is not used: nothing is divided at random" in capsys.readouterr().out


def test_train_names_the_run_folder_itself(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(bars), *flags({**TINY, "epochs": 1, "max_steps": 1})]) == 0
    assert (tmp_path / "runs" / "bars-ca3d_tiny" / "best.safetensors").is_file()


def test_eval(
    bars: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    assert main(["eval", str(trained), str(bars), "--out", str(out), "--workers", "0"]) == 0
    assert "top-1" in capsys.readouterr().out
    ours = json.loads((out / "results.json").read_text())
    trainer = json.loads((trained / "test" / "results.json").read_text())
    for key in ("top1", "top5", "mean_class", "videos", "per_class"):
        assert ours[key] == trainer[key]
    assert ours["loss"] == pytest.approx(trainer["loss"], rel=1e-5)
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert right / len(rows) == ours["top1"]
    with (out / "confusion.csv").open(newline="") as file:
        matrix = list(csv.DictReader(file))
    assert sum(int(row[row["true"]]) for row in matrix) == right
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    (out / "results.json").write_text("mine")
    assert main(["eval", str(trained), str(bars), "--out", str(out)]) == 1
    assert f"--out {out / 'results.json'}, " in capsys.readouterr().err
    assert (out / "results.json").read_text() == "mine"
    assert main(["eval", str(trained), str(bars), "--out", str(out), "--force"]) == 0
    assert json.loads((out / "results.json").read_text()) == ours


def test_eval_knows_what_a_run_drew_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "my data", videos=6)
    run = tmp_path / "run"
    options = flags({**TINY, "epochs": 1, "max_steps": 1, "progress": "plain"})
    assert main(["train", str(root), "--out", str(run), *options]) == 0
    assert "no split files in" in capsys.readouterr().out
    command = ["eval", str(run), str(root), "--workers", "0"]
    caplog.clear()
    assert main(command) == 0
    test = (run / "splits" / "test.csv").read_text().splitlines()[1:]
    assert f"split test, 1 clips x 1 crops: {len(test)} videos" in capsys.readouterr().out
    assert f"{root} has no split test: taking that of the run" in caplog.text
    assert "trained the model" not in caplog.text
    shutil.copy(run / "splits" / "train.csv", root / "test.csv")
    shutil.copy(run / "splits" / "test.csv", root / "train.csv")
    assert main(command) == 0
    count = len((root / "test.csv").read_text().splitlines()) - 1
    assert f"{count} of these {count} videos trained the model" in caplog.text


def test_names_that_look_like_markup(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "a[/b]", videos=1)
    video = (folder / "up" / "00.avi").rename(folder / "up" / "clip [h26].avi")
    assert main(["predict", str(video), "--weights", str(trained)]) == 0
    assert "clip [h26].avi" in "".join(capsys.readouterr().out.split("\n"))


def test_eval_of_many_views_as_json(
    bars: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--clips", "3", "--crops", "3", "--split", "all", "--workers", "0", "--json"]
    figures = []
    for average in ("logits", "softmax"):
        assert main(["eval", str(trained), str(bars), *words, "--average", average]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert [f["videos"] for f in figures] == [20, 20]
    assert figures[0]["loss"] != figures[1]["loss"]


def test_predict_a_file(
    bars: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "timeline.png"
    video = str(bars / "up" / "00.avi")
    words = ["predict", video, "--weights", str(trained)]
    assert main([*words, "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "up" in text
    assert "%" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.write_text("mine")
    assert main([*words, "--picture", str(picture)]) == 1
    assert f"--picture {picture}: exists already" in capsys.readouterr().err
    assert picture.read_text() == "mine"
    assert main([*words, "--picture", str(picture), "--force"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main([*words, "--json", "--top-k", "1"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["path"] == video
    assert len(content["labels"]) == 1
    assert content["windows"][0]["start"] == 0.0


def test_predict_a_folder_leaves_out_what_is_broken(
    bars: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "new", videos=1)
    (folder / "up" / "bad.avi").write_bytes(b"no video")
    shutil.copy(folder / "up" / "00.avi", folder / "up" / "00.mkv")
    pictures = tmp_path / "pictures"
    words = ["predict", str(folder), "--weights", str(trained), "--json"]
    assert main([*words, "--picture", str(pictures)]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 3
    assert captured.err.count("\n") == 1
    assert "bad.avi" in captured.err
    found = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    assert found == ["down/00.png", "up/00.avi.png", "up/00.mkv.png"]


def test_convert_then_predict(
    bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {}
    for entry in entries(models.ca3d(num_classes=2, preset="published")):
        if entry.published.endswith("num_batches_tracked"):
            state[entry.published] = torch.tensor(7)
        else:
            state[entry.published] = torch.full(entry.shape, 0.01)
    torch.save(state, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    words = ["convert", str(tmp_path / "in.pt"), "--out", str(out), "--size", "32"]
    assert main(words) == 0
    assert "--classes" in capsys.readouterr().out
    video = str(bars / "up" / "00.avi")
    assert main(["predict", video, "--weights", str(out)]) == 1
    assert "--mean" in capsys.readouterr().err
    long = ",".join(f"activity number {number}" for number in range(101))
    assert main([*words, "--force", "--classes", long]) == 1
    assert "the model has 2 classes, got 101" in capsys.readouterr().err
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\nup\n")
    assert main([*words, "--force", "--classes", str(latin)]) == 1
    assert f"--classes {latin}: cannot be read as UTF-8 text" in capsys.readouterr().err
    words += ["--classes", "down,up", "--mean", "0.4", "0.4", "0.4", "--std", "0.2", "0.2", "0.2"]
    assert main(words) == 1
    assert f"--out {out}: exists already; --force replaces it" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    assert weights.load_info(out).color == "bgr"
    assert main(["predict", video, "--weights", str(out)]) == 0


def test_data_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "data", videos=5)
    assert main(["data", "split", str(root), "--val", "0.2", "--test", "0.2"]) == 0
    assert "train: 6 videos" in capsys.readouterr().out
    assert main(["data", "check", str(root), "--workers", "1"]) == 0
    assert main(["data", "check", str(root), "--json", "--quick"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("\n{") :])["ok"]
    assert main(["data", "cache", str(root), "--short-side", "32", "--workers", "1"]) == 0
    assert "10 videos written" in capsys.readouterr().out
    (root / "up" / "00.avi").write_bytes(b"broken")
    assert main(["data", "check", str(root), "--workers", "1"]) == 1
    assert "00.avi" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert "mocap30" in capsys.readouterr().out


def test_info(bars: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, part in (
        (trained, "best validation accuracy"),
        (trained / "best.safetensors", "classes: down, up"),
        (bars, "videos: 20"),
        (bars / "up" / "00.avi", "frames per second: 10.0"),
    ):
        assert main(["info", str(path)]) == 0
        assert part in capsys.readouterr().out
    epochs = []
    for run, keys in (
        (trained, ("best epoch",)),
        (trained, ("test", "epoch")),
        (trained, ("best", "extra", "epoch")),
        (trained / "best.safetensors", ("extra", "epoch")),
        (trained, ("last epoch", "epoch")),
        (trained, ("epochs done",)),
    ):
        assert main(["info", str(run), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for key in keys:
            found = found[key]
        epochs.append(found)
    best = load_info(trained / "best.safetensors").extra["epoch"] + 1
    assert epochs == [best, best, best, best, 3, 3]
    assert main(["info", "--models"]) == 0
    assert "ca3d: 6,950,891 parameters" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["torch"]
