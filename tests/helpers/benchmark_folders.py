"""UCF101, HMDB51 and Kinetics-400 in their true layouts and split-file formats, but tiny."""

from collections.abc import Callable
from pathlib import Path

from tiny_videos import bar_video, write_video

Write = Callable[[Path, int], None]


def placeholder(path: Path, number: int) -> None:
    """An empty file in the place of a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def real(path: Path, number: int) -> None:
    """A video of a bar that moves down in one class and up in the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    direction = "down" if path.parent.name in ("Archery", "brush_hair") else "up"
    write_video(path, bar_video(direction, number, frames=24))


def make_ucf101(root: Path, write: Write = placeholder, groups: int = 8, clips: int = 2) -> Path:
    """root/UCF-101/CLASS/*.avi and root/ucfTrainTestlist/*.txt; returns root/UCF-101.

    As in the true lists the first groups are the test of split 1, the next of split 2, ...
    """
    classes = ("Archery", "HandstandPushups")
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    lists.joinpath("classInd.txt").write_text(
        "".join(f"{n} {name}\r\n" for n, name in enumerate(classes, 1))
    )
    number = 0
    rows = []
    for place, label in enumerate(classes, 1):
        # The true data set spells this class in two ways.
        name = label.replace("Handstand", "HandStand")
        for group in range(1, groups + 1):
            for clip in range(1, clips + 1):
                file = f"{label}/v_{name}_g{group:02d}_c{clip:02d}.avi"
                write(root / "UCF-101" / file, number)
                rows.append((file, group, place))
                number += 1
    for fold in (1, 2, 3):
        test = {2 * fold - 1, 2 * fold}
        train_lines = [f"{file} {place}\r\n" for file, group, place in rows if group not in test]
        test_lines = [f"{file}\r\n" for file, group, _ in rows if group in test]
        (lists / f"trainlist{fold:02d}.txt").write_text("".join(train_lines))
        (lists / f"testlist{fold:02d}.txt").write_text("".join(test_lines))
    return root / "UCF-101"


HMDB_SOURCES = (
    "April_09",
    "#122_Cleaning_Up_The_Beach",
    "Faith_Rewarded",
    "(HQ)_Rock_Me",
    "Silence_of_the_Lambs_1",
    "jonhs_netfreemovies",
    "prelinger_LetsPlay1949",
    "IndianaJones_u_nm",
)


def make_hmdb51(root: Path, write: Write = placeholder, clips: int = 2) -> Path:
    """root/hmdb51_org/CLASS/*.avi and root/testTrainMulti_7030_splits/*.txt; returns hmdb51_org."""
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    number = 0
    for label in ("brush_hair", "wave"):
        rows = []
        for place, source in enumerate(HMDB_SOURCES):
            for clip in range(clips):
                file = f"{source}_{label}_u_nm_np1_ba_goo_{clip}.avi"
                write(root / "hmdb51_org" / label / file, number)
                rows.append((file, place))
                number += 1
        for fold in (1, 2, 3):
            # Of the last source nothing is used, as the lists say it with a 0.
            uses = [0 if p == 7 else 2 if p // 2 == fold - 1 else 1 for _, p in rows]
            text = "".join(f"{file} {use} \n" for (file, _), use in zip(rows, uses, strict=True))
            (lists / f"{label}_test_split{fold}.txt").write_text(text)
    return root / "hmdb51_org"


def make_kinetics400(root: Path, write: Write = placeholder, test_list: bool = True) -> Path:
    """root/{train,val,test}/CLASS/ID_START_END.mp4 and root/{train,val,test}.csv; returns root."""
    root.mkdir(parents=True)
    number = 0
    for split, videos in (("train", 6), ("val", 2), ("test", 2)):
        if split == "test" and not test_list:
            continue
        rows = ["label,youtube_id,time_start,time_end,split"]
        for label in ("abseiling", "air drumming"):
            for video in range(videos):
                name = f"{split[:2]}-{label[:2]}{video:06d}"
                for start in (95, 7) if split == "train" else (95,):
                    folder = root / split / label.replace(" ", "_")
                    write(folder / f"{name}_{start:06d}_{start + 10:06d}.mp4", number)
                    rows.append(f"{label},{name},{start},{start + 10},{split}")
                    number += 1
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root
