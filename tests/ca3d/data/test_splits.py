import logging
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from ca3d.data.samples import Sample, find_samples, read_list
from ca3d.data.splits import (
    check_disjoint,
    load_splits,
    overlaps,
    random_split,
    split_dataset,
    with_groups,
)
from ca3d.errors import UserError


def clips(counts: dict[str, int], group_of=None) -> list[Sample]:
    return [
        Sample(Path(f"{label}/{i:03}.mp4"), label, group_of(label, i) if group_of else None)
        for label, n in counts.items()
        for i in range(n)
    ]


class TestPlain:
    def test_shares_hold_in_every_class(self):
        parts = random_split(clips({"a": 100, "b": 40, "c": 60}))
        assert {name: len(part) for name, part in parts.items()} == {
            "train": 140, "val": 30, "test": 30,
        }  # fmt: skip
        assert Counter(s.label for s in parts["val"]) == {"a": 15, "b": 6, "c": 9}

    def test_small_classes_add_up_to_the_shares(self):
        parts = random_split(clips({f"c{i:02}": 3 for i in range(40)}))
        assert {s.label for s in parts["train"]} == {f"c{i:02}" for i in range(40)}
        assert len(parts["val"]) == len(parts["test"]) == 18

    @given(
        st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 30), min_size=1, max_size=8),
        st.integers(0, 2**32),
        st.randoms(),
    )
    def test_a_partition_that_depends_on_set_and_seed_only(self, counts, seed, shuffler):
        samples = clips(counts)
        shuffled = list(samples)
        shuffler.shuffle(shuffled)
        try:
            parts = random_split(samples, seed=seed)
        except UserError:
            if len(samples) >= 40:
                raise
            reject()
        assert random_split(shuffled, seed=seed) == parts
        assert sorted((s for part in parts.values() for s in part), key=str) == sorted(
            samples, key=str
        )
        assert {s.label for s in parts["train"]} == set(counts)

    def test_seeds_differ(self):
        samples = clips({"a": 30, "b": 30})
        assert random_split(samples, seed=1) != random_split(samples, seed=2)

    def test_warns_of_leaks(self, caplog):
        with caplog.at_level(logging.WARNING, "ca3d.data"):
            random_split(clips({"a": 30, "b": 30}))
        assert "clips of one recording or person may lie on both sides" in caplog.text

    def test_two_parts(self):
        parts = random_split(clips({"a": 20, "b": 20}), {"train": 0.8, "val": 0.2})
        assert {name: len(part) for name, part in parts.items()} == {"train": 32, "val": 8}

    def test_one_video_a_class_goes_to_training(self):
        with pytest.raises(UserError, match=r"too few videos or groups for a share of 0.15 in val"):
            random_split(clips({"a": 1, "b": 1}))


class TestGrouped:
    def test_groups_stay_together(self, caplog):
        samples = clips({"a": 60, "b": 60, "c": 60}, lambda label, i: f"person{i % 12}")
        with caplog.at_level(logging.WARNING, "ca3d.data"):
            parts = random_split(samples, seed=3)
        assert not overlaps(parts)
        assert not caplog.records
        assert len(parts["train"]) == pytest.approx(126, abs=15)
        assert all({s.label for s in part} == {"a", "b", "c"} for part in parts.values())

    @given(st.integers(0, 2**32), st.integers(3, 30), st.integers(1, 6))
    def test_every_class_is_in_training(self, seed, groups, classes):
        source = random.Random(seed)
        samples = [
            Sample(Path(f"{i}.mp4"), f"c{i % classes}", f"g{source.randrange(groups)}")
            for i in range(10 * classes)
        ]
        try:
            parts = random_split(samples, seed=seed)
        except UserError:
            if len({s.group for s in samples}) > 6:
                raise
            reject()
        assert {s.label for s in parts["train"]} == {s.label for s in samples}
        assert not overlaps(parts)
        assert sum(len(part) for part in parts.values()) == len(samples)

    def test_groups_of_one_class_each(self):
        # As in UCF101: 25 groups a class, of four to seven clips.
        samples = clips({f"c{k}": 125 for k in range(6)}, lambda label, i: f"{label}_g{i % 25}")
        parts = random_split(samples, seed=0)
        for part, share in zip(parts.values(), (0.7, 0.15, 0.15), strict=True):
            for count in Counter(s.label for s in part).values():
                assert count == pytest.approx(125 * share, abs=5)

    def test_by_expression(self):
        samples = [
            Sample(Path(f"wave/v_wave_g{g:02}_c{c:02}.avi"), "wave")
            for g in range(20)
            for c in range(4)
        ]
        parts = random_split(samples, seed=1, group=r"_(g\d+)_")
        groups = [{s.path.name[7:10] for s in part} for part in parts.values()]
        assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]

    def test_too_few_groups(self):
        samples = clips({"a": 20, "b": 20}, lambda label, i: f"g{i % 2}")
        with pytest.raises(UserError, match="too few videos or groups"):
            random_split(samples)

    def test_class_missing_from_a_part_is_told(self, caplog):
        samples = clips({"a": 30, "b": 30}, lambda label, i: f"{label}{i % 10}")
        samples += [Sample(Path("rare/1.mp4"), "rare", "a0")]
        with caplog.at_level(logging.WARNING, "ca3d.data"):
            random_split(samples)
        assert "val has no videos of 1 classes: rare" in caplog.text


class TestExpressions:
    def test_groups_are_joined(self):
        sample = Sample(Path("x/s01_day2_c3.mp4"), "x")
        assert with_groups([sample], r"(s\d+)_(day\d)")[0].group == "s01-day2"
        assert with_groups([sample], r"s\d+")[0].group == "s01"

    def test_malformed(self):
        with pytest.raises(UserError, match="no regular expression"):
            with_groups(clips({"a": 1}), "(")

    def test_no_match(self):
        with pytest.raises(UserError, match=r"does not match the file name 000\.mp4"):
            with_groups(clips({"a": 1}), "g(\\d)_")


@pytest.mark.parametrize(
    "fractions",
    [{"train": 0.5, "val": 0.2}, {"train": 1.2, "val": -0.2}, {}, {"train": 0.0, "val": 1.0}],
)
def test_bad_fractions(fractions):
    with pytest.raises(ValueError, match="fractions"):
        random_split(clips({"a": 10}), fractions)


def test_bad_seed_and_nothing_to_divide():
    with pytest.raises(ValueError, match="seed"):
        random_split(clips({"a": 10}), seed=-1)
    with pytest.raises(UserError, match="no videos"):
        random_split([])


class TestOverlaps:
    def test_same_file_under_another_name(self, tmp_path):
        (tmp_path / "a.mp4").write_bytes(b"x")
        (tmp_path / "link.mp4").symlink_to("a.mp4")
        splits = {
            "train": [Sample(tmp_path / "a.mp4", "x")],
            "val": [Sample(tmp_path / "sub" / ".." / "a.mp4", "x")],
            "test": [Sample(tmp_path / "link.mp4", "x")],
        }
        (tmp_path / "sub").mkdir()
        assert [o[:2] for o in overlaps(splits)] == [
            ("train", "val"), ("train", "test"), ("val", "test"),
        ]  # fmt: skip
        with pytest.raises(UserError, match="3 videos lie in two splits"):
            check_disjoint(splits)

    def test_groups_are_found_but_no_error(self):
        splits = {
            "train": [Sample(Path("a.mp4"), "x", "anna")],
            "test": [Sample(Path("b.mp4"), "x", "anna")],
        }
        assert overlaps(splits) == [("train", "test", "group", "anna")]
        check_disjoint(splits)


class TestDataset:
    @pytest.fixture
    def root(self, dataset, tmp_path) -> Path:
        return Path(shutil.copytree(dataset, tmp_path / "videos"))

    SHARES = {"train": 0.34, "val": 0.33, "test": 0.33}  # noqa: RUF012

    def test_writes_lists_that_load(self, root):
        report = split_dataset(root, self.SHARES, group=r"(p\d)_")
        assert [f.name for f in report.files] == ["train.csv", "val.csv", "test.csv"]
        assert not report.warnings
        splits = load_splits(root)
        assert splits == report.splits
        assert {len({s.group for s in part}) for part in splits.values()} == {1}
        assert "train: 4 videos, 2 classes, 1 groups" in str(report)

    def test_existing_lists_are_kept(self, root):
        split_dataset(root, self.SHARES, group=r"(p\d)_")
        before = (root / "train.csv").read_text()
        with pytest.raises(UserError, match=r"has train\.csv already; nothing was changed"):
            split_dataset(root, self.SHARES, seed=3)
        assert (root / "train.csv").read_text() == before
        split_dataset(root, {"train": 0.5, "val": 0.5}, seed=3, overwrite=True)
        assert len(read_list(root / "train.csv")) == 6

    def test_elsewhere(self, root, tmp_path):
        report = split_dataset(root, self.SHARES, out=tmp_path / "lists")
        assert "warning: a plain random split" in str(report)
        assert not (root / "train.csv").exists()
        assert {s.path for s in read_list(tmp_path / "lists" / "val.csv", root)} < {
            s.path for s in find_samples(root)
        }

    def test_column_of_a_list(self, root):
        rows = [
            f"{s.path.relative_to(root)},{s.label},{s.path.name[:2]}" for s in find_samples(root)
        ]
        (root / "all.csv").write_text("\n".join(["path,label,person", *rows]))
        report = split_dataset(root, self.SHARES, group="person", list_file=root / "all.csv")
        assert not overlaps(report.splits)
        assert not report.warnings
        (root / "all.csv").write_text("\n".join(["path,label,person", rows[0][:-2], *rows[1:]]))
        with pytest.raises(UserError, match="1 of 12 videos have no group"):
            split_dataset(
                root, self.SHARES, group="person", list_file=root / "all.csv", overwrite=True
            )

    def test_divided_folders(self, root, tmp_path):
        shutil.copytree(root, tmp_path / "parent" / "train")
        with pytest.raises(UserError, match="is divided into the folders"):
            split_dataset(tmp_path / "parent")

    def test_no_splits_to_load(self, root):
        with pytest.raises(UserError, match="has no splits"):
            load_splits(root)

    def test_a_file_in_two_lists(self, root):
        split_dataset(root, self.SHARES)
        shutil.copy(root / "train.csv", root / "val.csv")
        with pytest.raises(UserError, match="lie in two splits"):
            load_splits(root)
