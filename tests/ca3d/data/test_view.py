import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ca3d.data.reader import open_video
from ca3d.data.sampling import ClipSpec
from ca3d.data.transforms import apply_cut, evaluation_crops
from ca3d.data.view import View, short_side_size
from ca3d.errors import UserError

sides = st.integers(2, 2000)


@pytest.mark.parametrize(
    "text", ["center", "letterbox", "roi 10,20,300,300", "roi 0.1,0.2,0.5,0.25"]
)
def test_a_view_survives_being_written_and_read(text):
    assert str(View.parse(text)) == text
    assert View.parse(str(View.parse(text))) == View.parse(text)


@pytest.mark.parametrize("text", ["roi:10,20,30,40", "roi=10,20,30,40", " roi 10,20,30,40 "])
def test_the_blank_may_be_another_sign(text):
    assert View.parse(text).roi == (10, 20, 30, 40)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "letterbox, center"),
        ("roi", "letterbox, center"),
        ("roi 1,2,3", "letterbox, center"),
        ("roi 1,2,x,4", "with numbers"),
        ("roi -1,0,10,10", "must not be negative"),
        ("roi 1,0,0,10", "must be positive"),
        ("roi 1,0,nan,10", "must not be negative"),
        ("roi 0.5,0,0.6,1", "reaches beyond"),
        ("roi 0.5,0,60,1", "whole numbers"),
    ],
)
def test_bad_views(text, said):
    with pytest.raises(UserError, match=said):
        View.parse(text)


def test_a_rectangle_beyond_the_frame():
    view = View.parse("roi 600,0,100,100")
    with pytest.raises(UserError, match="beyond the frame of 640x480"):
        view.cut(640, 480, 112)


@given(
    sides,
    sides,
    st.integers(8, 128),
    st.sampled_from(["center", "letterbox", "roi 0.2,0.1,0.5,0.6"]),
)
@settings(max_examples=200, deadline=None)
def test_what_is_cut_covers_the_crop(width, height, resize, text):
    """Scaled and cut, the region is at least as large as the crop, and hardly larger."""
    cut = View.parse(text).cut(width, height, resize)
    w, h = short_side_size(width, height, cut.short_side)
    if cut.box is not None:
        left, top, box_w, box_h = cut.box
        assert 0 <= left <= w - box_w
        assert 0 <= top <= h - box_h
        w, h = box_w, box_h
    if cut.scaled is not None:
        w, h = cut.scaled
    left, top, right, bottom = cut.pad
    assert min(w + left + right, h + top + bottom) == resize
    if text == "letterbox" and max(width, height) < resize * min(width, height):
        # The short side is rounded down to a pixel, which costs the long one its share of that.
        assert resize - max(w, h) < 1 + max(width, height) / min(width, height)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (200, 48), (90, 90)])
@pytest.mark.parametrize(
    "text", ["center", "letterbox", "roi 0.25,0.25,0.5,0.5", "roi 4,8,40,32", "roi 30,30,6,12"]
)
def test_a_marked_rectangle_fills_the_region(tmp_path, write_video, size, text):
    """The view's region is painted bright: nothing else may be in the clip, and all of it."""
    width, height = size
    view = View.parse(text)
    left, top, w, h = view.region(width, height)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[top : top + h, left : left + w] = 200
    path = write_video(tmp_path / "marked.avi", [image] * 4, options={"qmin": "1", "qmax": "1"})
    spec = ClipSpec(frames=2, stride=1, size=32, resize=32, view=view)
    with open_video(path) as video:
        where = spec.sample(video.num_frames, video.frames_per_second)
        frames = spec.read(video, where, spec.resize)
    clip = evaluation_crops(frames, 32)[0].float()
    bright = clip.mean(dim=(0, 1, 2)) > 100
    if text != "letterbox":
        # A seam of a pixel where scaling mixes the border's colours.
        assert bool(bright[1:-1, 1:-1].all())
    else:
        share = min(w, h) / max(w, h)
        assert float(bright.float().mean()) == pytest.approx(share, abs=0.07)


def test_a_clip_of_the_center_is_what_it_was(tmp_path, write_video):
    path = write_video(tmp_path / "a.avi", 8)
    spec = ClipSpec(frames=4, stride=1, size=32, resize=32)
    with open_video(path) as video:
        where = spec.sample(video.num_frames, video.frames_per_second)
        expected = video.frames(where.reshape(-1).tolist(), 32)
        assert torch.equal(spec.read(video, where, 32)[0], expected)


def test_an_empty_cut_changes_nothing():
    frames = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    assert apply_cut(frames, View().cut(8, 8, 8)) is frames
