"""Official split files of tiny copies in the true layouts."""

from pathlib import Path

import pytest
from benchmark_folders import HMDB_SOURCES, make_hmdb51, make_kinetics400, make_ucf101

from ca3d.data.benchmarks import Partition, partition
from ca3d.data.split_options import SplitOptions
from ca3d.data.splits import overlaps
from ca3d.errors import UserError


def divide(root: Path, **options: object) -> Partition:
    result = partition(root, SplitOptions(**options))  # type: ignore[arg-type]
    assert result is not None
    return result


def names(result: Partition, part: str) -> set[str]:
    return {s.path.name for s in result.splits[part]}


def groups(result: Partition, part: str) -> set[str | None]:
    return {s.group for s in result.splits[part]}


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_ucf101(tmp_path: Path, fold: int) -> None:
    videos = make_ucf101(tmp_path)
    found = divide(videos, fold=fold)
    assert found.protocol.to_dict() == {
        "name": "official",
        "dataset": "ucf101",
        "fold": fold,
        "seed": 0,
        "val_fraction": 0.15,
    }
    test = {f"g{2 * fold - 1:02d}", f"g{2 * fold:02d}"}
    assert {name.split("_")[2] for name in names(found, "test")} == test
    assert len(found.splits["test"]) == 8
    assert len(found.splits["train"]) + len(found.splits["val"]) == 24
    assert all(s.path.is_file() for part in found.splits.values() for s in part)
    # Whole source videos are held out, and g08 of two classes are two source videos.
    assert not overlaps(found.splits)
    held_out = [s.group for s in found.splits["val"]]
    assert all(held_out.count(group) == 2 for group in held_out)
    assert {s.label for s in found.splits["val"]} == {"Archery", "HandstandPushups"}
    assert len(set().union(*(groups(found, part) for part in found.splits))) == 16


def test_rows_that_repeat_a_video_count_once(tmp_path: Path) -> None:
    videos = make_ucf101(tmp_path)
    expected = divide(videos)
    for name in ("trainlist01.txt", "testlist01.txt"):
        file = tmp_path / "ucfTrainTestlist" / name
        rows = file.read_text().splitlines()
        file.write_text("\n".join([*rows, rows[0], rows[2], rows[0]]) + "\n")
    found = divide(videos)
    assert found.splits == expected.splits
    assert "6 rows repeat a video of the same list and are left out" in found.notes


@pytest.mark.parametrize("protocol", ["official", "published"])
def test_an_official_split_that_is_not_there_is_refused(tmp_path: Path, protocol: str) -> None:
    videos = make_ucf101(tmp_path)
    if protocol == "official":
        (tmp_path / "ucfTrainTestlist").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"--fold 2: .* has no official splits"):
        partition(videos, SplitOptions(fold=2, protocol=protocol))  # type: ignore[arg-type]


def test_a_data_set_is_not_taken_for_another(tmp_path: Path) -> None:
    videos = make_ucf101(tmp_path)
    options = SplitOptions(dataset="hmdb51", protocol="published")
    with pytest.raises(UserError, match=r"--dataset hmdb51: .* is ucf101, by its split files"):
        partition(videos, options)


def test_ucf101_in_every_place_of_the_split_files(tmp_path: Path) -> None:
    videos = make_ucf101(tmp_path / "a")
    expected = divide(videos).splits
    # The folder above both, the split files inside, elsewhere, and the data set named.
    assert divide(tmp_path / "a").splits == expected
    elsewhere = tmp_path / "lists"
    (tmp_path / "a" / "ucfTrainTestlist").rename(elsewhere)
    assert partition(videos, SplitOptions()) is None
    assert divide(videos, split_files=str(elsewhere)).splits == expected
    assert divide(videos, dataset="ucf101", split_files=str(elsewhere)).splits == expected
    elsewhere.rename(videos / ".." / "UCF-101" / "ucfTrainTestlist")
    assert divide(videos).splits == expected


def test_validation_depends_on_lists_and_seed_only(tmp_path: Path) -> None:
    videos = make_ucf101(tmp_path)
    first = divide(videos)
    for path in list(videos.rglob("*_c01.avi"))[:5]:
        path.unlink()
    assert divide(videos).splits == first.splits
    other = partition(videos, SplitOptions(), seed=1)
    assert other is not None
    assert names(other, "val") != names(first, "val")
    assert names(other, "test") == names(first, "test")
    none = partition(videos, SplitOptions(), val_fraction=0.0)
    assert none is not None
    assert set(none.splits) == {"train", "test"}


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_hmdb51(tmp_path: Path, fold: int) -> None:
    found = divide(make_hmdb51(tmp_path), fold=fold)
    assert groups(found, "test") == set(HMDB_SOURCES[2 * fold - 2 : 2 * fold])
    used = set().union(*(groups(found, part) for part in found.splits))
    assert used == set(HMDB_SOURCES[:7])
    assert sum(map(len, found.splits.values())) == 28
    # A film that gave clips to both classes is on one side as a whole.
    assert not overlaps(found.splits)
    assert found.classes == ["brush_hair", "wave"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "April_09"),
        ("#122_Cleaning_Up_brush_hair_f_nm_np1_fr_med_1.avi", "#122_Cleaning_Up"),
        ("Sexy_girl_BRUSH_HAIR_h_cm_np2_le_bad_10.avi", "Sexy_girl"),
        ("a_film_u_nm_np1_ba_goo_0.avi", "a_film"),
        ("renamed.avi", "brush_hair/renamed"),
    ],
)
def test_hmdb51_source_by_file_name(name: str, source: str) -> None:
    from ca3d.data.benchmarks.hmdb51 import group_of

    assert group_of(Path(name), "brush_hair") == source


def test_kinetics400(tmp_path: Path) -> None:
    root = make_kinetics400(tmp_path / "k400")
    found = divide(root)
    assert {name: len(part) for name, part in found.splits.items()} == {
        "train": 24,
        "val": 4,
        "test": 4,
    }
    assert found.classes == ["abseiling", "air drumming"]
    assert found.protocol.fold is None
    assert all(s.path.is_file() for part in found.splits.values() for s in part)
    assert len(groups(found, "train")) == 12


def test_kinetics400_without_a_test_list(tmp_path: Path) -> None:
    root = make_kinetics400(tmp_path / "k400", test_list=False)
    found = divide(root)
    assert names(found, "test") == {p.name for p in (root / "val").rglob("*.mp4")}
    assert found.splits["val"]
    assert not overlaps(found.splits)
    assert "no test list" in found.notes[0]


@pytest.mark.parametrize("form", ["path,label", "pairs", "ids"])
def test_kinetics400_list_forms(tmp_path: Path, form: str) -> None:
    root = make_kinetics400(tmp_path / "k400", test_list=False)
    expected = {p.name for p in (root / "train").rglob("*.mp4")}
    lists = tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "val"):
        files = sorted((root / split).rglob("*.mp4"))
        rows = [f"{p.relative_to(root)},{p.parent.name}" for p in files]
        if form == "path,label":
            text = "\n".join(["path,label", *rows])
        elif form == "pairs":
            text = "\n".join(f"{p.relative_to(root)} {int('air' in str(p))}" for p in files)
        else:
            # Videos that were saved under their identifier alone, and one that is missing.
            ids = [f"{split[0]}-{n:09d}" for n in range(len(files))]
            for path, name in zip(files, ids, strict=True):
                path.rename(path.with_name(f"{name}.mp4"))
            rows = [f"jump {int(n[-1]) % 2},{n},1,11" for n in ids]
            text = "\n".join(["label,youtube_id,time_start,time_end", *rows, "jump 0,gone,5,15"])
        (lists / f"kinetics_{split}.csv").write_text(text)
    found = divide(root, dataset="kinetics400", split_files=str(lists))
    for file in root.glob("*.csv"):
        file.unlink()
    for file in lists.iterdir():
        file.rename(root / file.name)
    assert divide(root, dataset="kinetics400").splits == found.splits
    listed = [*found.splits["train"], *found.splits["val"]]
    if form == "ids":
        assert [s.path.name for s in listed if not s.path.is_file()] == ["gone_000005_000015.mp4"]
        assert found.classes == ["jump 0", "jump 1"]
    else:
        assert {s.path.name for s in listed} == expected
        assert len(found.classes) == 2


@pytest.mark.parametrize("start", ["", "soon", "nan", "inf"])
def test_kinetics400_times_must_be_numbers(tmp_path: Path, start: str) -> None:
    root = make_kinetics400(tmp_path / "k400", test_list=False)
    lists = tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "val"):
        text = f"label,youtube_id,time_start,time_end\njump 0,a,{start},15\n"
        (lists / f"kinetics_{split}.csv").write_text(text)
    with pytest.raises(UserError, match=r"_train\.csv, line 2: time_start and time_end must be"):
        divide(root, dataset="kinetics400", split_files=str(lists))


def test_own_lists_come_first_unless_the_data_set_is_named(tmp_path: Path) -> None:
    videos = make_ucf101(tmp_path)
    (videos / "train.csv").write_text("path,label\nArchery/v_Archery_g01_c01.avi,Archery\n")
    assert partition(videos, SplitOptions()) is None
    assert divide(videos, dataset="ucf101").protocol.name == "official"
    assert partition(videos, SplitOptions(dataset="folder")) is None


def test_other_folders_beside_the_split_files_are_no_benchmark(tmp_path: Path) -> None:
    make_ucf101(tmp_path)
    (tmp_path / "mine" / "fall").mkdir(parents=True)
    (tmp_path / "mine" / "meal").mkdir()
    assert partition(tmp_path / "mine", SplitOptions()) is None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("trainlist01.txt", "Bowling/v_Bowling_g01_c01.avi 1\n", r"line 1: must be CLASS/VIDEO"),
        (
            "trainlist01.txt",
            "\nArchery/v_Archery_g08_c01.avi 2\n",
            "line 2: class Archery has number 1",
        ),
        ("classInd.txt", "Archery\n", r"line 1: must be NUMBER NAME, got 'Archery'"),
        ("testlist01.txt", "", "lists no test videos"),
    ],
)
def test_malformed_files_of_ucf101(tmp_path: Path, file: str, text: str, message: str) -> None:
    videos = make_ucf101(tmp_path)
    (tmp_path / "ucfTrainTestlist" / file).write_text(text)
    with pytest.raises(UserError, match=message):
        divide(videos, dataset="ucf101")


def test_wrong_options(tmp_path: Path) -> None:
    videos = make_ucf101(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--fold must be 1, 2 or 3, not 4"):
        divide(videos, fold=4)
    with pytest.raises(UserError, match="no official split files of hmdb51"):
        divide(videos, dataset="hmdb51")
    with pytest.raises(UserError, match="say which with --dataset"):
        divide(videos, split_files=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such folder"):
        divide(videos, dataset="ucf101", split_files="nowhere")
    with pytest.raises(UserError, match="--dataset kinetics400 has one split"):
        divide(videos, dataset="kinetics400", fold=2)
    (tmp_path / "ucfTrainTestlist" / "testlist02.txt").unlink()
    with pytest.raises(UserError, match=r"testlist02.txt: no such split file"):
        divide(videos, fold=2)
    hmdb = make_hmdb51(tmp_path / "h")
    (tmp_path / "h" / "testTrainMulti_7030_splits" / "wave_test_split1.txt").write_text("a.avi 3\n")
    with pytest.raises(UserError, match=r"must be VIDEO and 0, 1 or 2, got 'a\.avi 3'"):
        divide(hmdb)
