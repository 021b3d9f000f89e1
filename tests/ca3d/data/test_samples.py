import json
import os
import shutil
from pathlib import Path

import pytest

from ca3d.data.samples import (
    Sample,
    find_samples,
    load_info,
    load_samples,
    read_list,
    sided_classes,
    splits_of,
    write_list,
)
from ca3d.errors import UserError


@pytest.fixture
def root(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "videos"))


def divide(root: Path) -> None:
    for split, person in (("train", 0), ("val", 1), ("test", 2)):
        part = [s for s in find_samples(root) if s.path.name.startswith(f"p{person}")]
        write_list(root / f"{split}.csv", part, root)


class TestClassFolders:
    def test_sorted_samples(self, root):
        samples = find_samples(root)
        assert len(samples) == 12
        assert samples == sorted(samples, key=lambda s: s.path)
        assert {s.label for s in samples} == {"jump", "walk"}

    def test_sub_folders_hidden_and_other_files(self, root):
        (root / "walk" / "outdoors").mkdir()
        shutil.move(root / "walk" / "p0_t0.avi", root / "walk" / "outdoors" / "A.AVI")
        (root / "walk" / "notes.txt").write_text("x")
        (root / "walk" / "._p0.avi").write_text("x")
        (root / ".git").mkdir()
        assert len(find_samples(root)) == 12

    def test_a_name_that_lists_cannot_hold_is_left_out(self, root, caplog):
        before = find_samples(root)
        bad = os.fsencode(root / "walk") + b"/caf\xe9.mp4"
        with open(bad, "wb"):
            pass
        assert find_samples(root) == before
        assert "caf\\xe9.mp4: its name is not UTF-8; it is left out" in caplog.text

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match="nowhere: no such folder"):
            find_samples(tmp_path / "nowhere")

    def test_a_file(self, root):
        with pytest.raises(UserError, match="is a file"):
            find_samples(root / "walk" / "p0_t0.avi")

    def test_no_class_folders(self, tmp_path):
        with pytest.raises(UserError, match="no class folders"):
            find_samples(tmp_path)

    def test_a_class_without_videos(self, root):
        (root / "sit").mkdir()
        with pytest.raises(UserError, match="sit: class folder without videos"):
            find_samples(root)

    def test_classes_that_differ_in_case(self, root):
        shutil.copytree(root / "walk", root / "Walk")
        with pytest.raises(UserError, match="duplicate class names 'Walk' and 'walk'"):
            find_samples(root)


class TestLists:
    def test_round_trip(self, root):
        samples = [Sample(s.path, s.label, s.path.name[:2]) for s in find_samples(root)]
        write_list(root / "all.csv", samples, root)
        assert read_list(root / "all.csv") == samples
        assert (root / "all.csv").read_text().splitlines()[1] == "jump/p0_t0.avi,jump,p0"

    def test_names_with_commas_quotes_and_umlauts(self, tmp_path):
        samples = [Sample(tmp_path / 'a, "b" ü.mp4', "walk, slow")]
        write_list(tmp_path / "l.csv", samples, tmp_path)
        assert read_list(tmp_path / "l.csv") == samples

    def test_files_outside_the_root_keep_their_whole_path(self, tmp_path):
        samples = [Sample(Path("/elsewhere/a.mp4"), "walk")]
        write_list(tmp_path / "l.csv", samples, tmp_path)
        assert read_list(tmp_path / "l.csv") == samples

    def test_jsonl(self, tmp_path):
        rows = [{"path": "a.mp4", "label": "x", "group": 7}, {"path": "b.mp4", "label": "y"}]
        (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        first, second = read_list(tmp_path / "l.jsonl")
        assert first == Sample(tmp_path / "a.mp4", "x", "7")
        assert second.group is None

    def test_group_from_another_column_and_a_byte_order_mark(self, tmp_path):
        (tmp_path / "l.csv").write_text("\ufeffpath,label,person,yaw\na.mp4,x,anna,0.5\n")
        assert read_list(tmp_path / "l.csv", group="person")[0].group == "anna"

    @pytest.mark.parametrize(
        ("text", "message"),
        [("a.mp4,walk\n", "first line must be path,label"), ("", "first line must be"),
         ("path,label\na.mp4,\n", "line 2: needs a label"),
         ("path,label\na.mp4\n", "line 2: needs a label"),
         ("path,label\n,walk\n", "line 2: needs a path"),
         ("path,label\na.mp4,x\na.mp4,y\n", "line 3: a.mp4 is both 'x' and 'y'")],
    )  # fmt: skip
    def test_bad_csv(self, tmp_path, text, message):
        (tmp_path / "l.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_list(tmp_path / "l.csv")

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "line 1: not JSON"), ("[1]", "line 1: must be an object"),
         ('{"path": 3, "label": "x"}', "line 1: needs a path")],
    )  # fmt: skip
    def test_bad_jsonl(self, tmp_path, text, message):
        (tmp_path / "l.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_list(tmp_path / "l.jsonl")

    def test_other_files(self, tmp_path):
        with pytest.raises(UserError, match="no such list"):
            read_list(tmp_path / "gone.csv")
        with pytest.raises(UserError, match=r"must end in \.csv or \.jsonl"):
            read_list(tmp_path / "list.txt")
        (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="UTF-8"):
            read_list(tmp_path / "binary.csv")


class TestSplits:
    def test_lists(self, root):
        divide(root)
        assert list(splits_of(root)) == ["train", "val", "test"]
        samples, classes = load_samples(root, "val")
        assert len(samples) == 4
        assert classes == ["jump", "walk"]
        assert len(load_samples(root)[0]) == 12

    def test_folders(self, root, tmp_path):
        parent = tmp_path / "divided"
        for split in ("train", "val"):
            shutil.copytree(root, parent / split)
        assert len(load_samples(parent, "val")[0]) == 12
        assert len(load_samples(parent)[0]) == 24

    def test_classes_are_those_of_the_whole_data_set(self, root):
        divide(root)
        write_list(root / "val.csv", [find_samples(root)[0]], root)
        assert load_samples(root, "val")[1] == ["jump", "walk"]

    def test_own_names(self, root):
        divide(root)
        shutil.copy(root / "val.csv", root / "night.csv")
        assert len(load_samples(root, "night")[0]) == 4

    def test_unknown(self, root):
        with pytest.raises(UserError, match=r"no split 'val' \(it has: none\).*ca3d data split"):
            load_samples(root, "val")
        divide(root)
        with pytest.raises(UserError, match=r"no split 'dev' \(it has: test, train, val\)"):
            load_samples(root, "dev")

    def test_empty_list(self, root):
        divide(root)
        (root / "val.csv").write_text("path,label\n")
        with pytest.raises(UserError, match=r"val\.csv: lists no videos"):
            load_samples(root, "val")


class TestInfo:
    def test_nothing_said(self, root):
        info = load_info(root)
        assert info.name == "videos"
        assert info.horizontal_flip is None

    def test_values(self, root):
        content = {"name": "n", "horizontal_flip": False, "frames_per_second": 12, "colour": 1}
        (root / "dataset.json").write_text(json.dumps(content))
        info = load_info(root)
        assert (info.name, info.horizontal_flip, info.frames_per_second) == ("n", False, 12)
        assert info.extra == {"colour": 1}

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "not JSON"), ("[]", "must be a JSON object"),
         ('{"horizontal_flip": "no"}', "horizontal_flip must be bool"),
         ('{"frames_per_second": true}', "frames_per_second must be int or float"),
         ('{"frames_per_second": -5}', "frames_per_second must be finite and above 0, got -5"),
         ('{"frames_per_second": NaN}', "frames_per_second must be finite and above 0, got nan")],
    )  # fmt: skip
    def test_bad(self, root, text, message):
        (root / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_info(root)


@pytest.mark.parametrize(
    ("name", "sided"),
    [("turn left", True), ("TurnRight", True), ("LEFT_HAND", True), ("wave-right", True),
     ("righthand", True), ("clockwise", True), ("bright", False), ("copyright", False),
     ("walk", False), ("uprights", False), ("AlrightNow", False)],
)  # fmt: skip
def test_sided_classes(name, sided):
    assert sided_classes([name]) == ([name] if sided else [])
