"""A stream's logits are those of the model on the whole clip, whatever was pushed when."""

import itertools
import random

import pytest
import safetensors.torch
import torch
from tiny_videos import bar_video, write_video
from torch.utils.flop_counter import FlopCounterMode

import ca3d
import ca3d.data.reader
import ca3d.errors
import ca3d.predict
import ca3d.weights
from ca3d import models
from ca3d import precision as regimes
from ca3d.models import count_macs
from ca3d.streaming import Stream

SIZE = 24
FRAMES = 16


def make_model(dtype=torch.float32, **options):
    """A model whose normalisations do something."""
    torch.manual_seed(3)
    model = models.create("ca3d_tiny", num_classes=7, **options).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    for name, parameter in model.named_parameters():
        if name.endswith("position.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


@pytest.fixture(scope="module")
def video():
    return torch.randn(3, 50, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def whole(video):
    """Logits of every window of the video, computed clip by clip and kept."""
    kept = {}

    def logits(pool, dtype):
        if (pool, dtype) not in kept:
            model = make_model(dtype, pool=pool)
            clips = video.to(dtype).unfold(1, FRAMES, 1).permute(1, 0, 4, 2, 3)
            regime = regimes.Float16() if dtype == torch.float16 else regimes.Regime()
            with torch.no_grad(), regime.autocast("cpu"):
                kept[pool, dtype] = model, model(clips).float()
        return kept[pool, dtype]

    return logits


def drain(stream, video, sizes):
    """Pushes the rest of a video in pieces; logits by the number of frames pushed until then."""
    found, start = {}, stream.frames_seen
    for size in sizes:
        piece = video[:, start : start + size]
        if not piece.shape[1]:
            break
        logits = stream.push(piece)
        start += piece.shape[1]
        assert stream.frames_seen == start
        if logits is not None:
            found[start] = logits
    return found


def tolerance(dtype, expected):
    """1e-5 in float32, of the largest logit where that is more than 1.

    These models have logits of up to 23. Of those, the clip's own float32 error is 1.4e-5.
    """
    largest = float(expected.abs().max())
    if dtype == torch.float16:
        return 4 * torch.finfo(dtype).eps * largest
    return 1e-5 * max(1.0, largest) if dtype == torch.float32 else 1e-12


def close(logits, expected):
    return (logits - expected).abs().max() <= tolerance(torch.float32, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pool", ["paper", "published"])
@pytest.mark.parametrize("stride", range(1, FRAMES + 1))
def test_every_stride_equals_the_whole_clip(stride, pool, dtype, video, whole):
    model, expected = whole(pool, dtype)
    video = video[:, :34]  # two windows of the largest stride, and both phases of the others
    found = drain(Stream(model, stride), video, itertools.repeat(1))
    last = range(FRAMES - 1, video.shape[1], stride)
    assert sorted(found) == [frame + 1 for frame in last]
    for end, logits in found.items():
        start = end - FRAMES
        assert logits.dtype == torch.float32
        error = (logits - expected[start]).abs().max()
        assert error <= tolerance(dtype, expected[start])


@pytest.mark.parametrize("pool", ["paper", "published"])
@pytest.mark.parametrize("start", [1, 2, 17])
def test_a_stream_may_begin_at_any_frame(start, pool, video, whole):
    model, expected = whole(pool, torch.float32)
    for end, logits in drain(Stream(model, 3), video[:, start:], itertools.repeat(2)).items():
        newest = start + (end - FRAMES) // 3 * 3
        assert close(logits, expected[newest])


@pytest.mark.parametrize("pool", ["paper", "published"])
@pytest.mark.parametrize("stride", [1, 2, 3, 8, 9, 15])
def test_pieces_of_any_size_equal_single_frames(stride, pool, video, whole):
    model, expected = whole(pool, torch.float32)
    draw = random.Random(stride)
    for largest in (3, 40):
        stream = Stream(model, stride)
        sizes = [draw.randint(1, largest) for _ in range(60)]
        singly, done = Stream(model, stride), 0
        for size in sizes:
            piece = video[:, done : done + size]
            if not piece.shape[1]:
                break
            logits = stream.push(piece)
            due = None
            for frame in piece.split(1, 1):
                one = singly.push(frame)
                due = one if one is not None else due
            done += piece.shape[1]
            assert (logits is None) == (due is None)
            if logits is not None:
                assert close(logits, due)
                first = (done - FRAMES) // stride * stride
                assert close(logits, expected[first])


@pytest.mark.parametrize("frames", [1, 2, 4, 8])
@pytest.mark.parametrize("pool", ["paper", "published"])
def test_other_clip_lengths(frames, pool, video):
    model = make_model(pool=pool, frames=frames)
    for stride in {1, 2, frames // 2 + 1, frames} & set(range(1, frames + 1)):
        for end, logits in drain(Stream(model, stride), video[:, :14], [1] * 14).items():
            with torch.no_grad():
                expected = model(video[None, :, end - frames : end])[0]
            assert close(logits, expected)


@pytest.mark.parametrize("heads", [(0, 0, 0, 0), (0, 2, 0, 4), (0, 0, 0, 4), (2, 0, 4, 0)], ids=str)
@pytest.mark.parametrize("pool", ["paper", "published"])
def test_other_places_of_the_temporal_halves(heads, pool, video):
    model = make_model(pool=pool, temporal_heads=heads, temporal_depths=(1, 1, 1, 1))
    for stride in (1, 2):
        for end, logits in drain(Stream(model, stride), video[:, :20], [1] * 20).items():
            with torch.no_grad():
                expected = model(video[None, :, end - FRAMES : end])[0]
            assert close(logits, expected)


def test_bfloat16_streams_by_autocast(video, whole):
    model, expected = whole("paper", torch.float32)
    logits = Stream(model, 1, precision="bfloat16").push(video[:, :FRAMES])
    with torch.no_grad():
        clip = regimes.Bfloat16().forward(model, video[None, :, :FRAMES])[0]
    assert torch.allclose(logits, clip, atol=2**-6 * float(clip.abs().max()), rtol=0)
    assert not torch.equal(logits, expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pool", ["paper", "published"])
def test_fused_models_stream_alike(pool, dtype, video, whole):
    model, _ = whole(pool, dtype)
    fused = ca3d.fuse(model)
    regime = regimes.Float16() if dtype == torch.float16 else regimes.Regime()
    for stride in (1, 2, 5):
        for end, logits in drain(Stream(fused, stride), video[:, :24], [1] * 24).items():
            clip = video[None, :, end - FRAMES : end].to(dtype)
            with torch.no_grad(), regime.autocast("cpu"):
                expected = fused(clip)[0].float()
            assert (logits - expected).abs().max() <= tolerance(dtype, expected)


def test_streams_together_equal_streams_alone(video, whole):
    model, expected = whole("paper", torch.float32)
    streams = [Stream(model, stride) for stride in (1, 2, 5)]
    done = [0, 3, 7]
    for stream, frames in zip(streams[1:], done[1:], strict=True):
        stream.push(video[:, :frames])
    compared = 0
    for step in range(20):
        counts = [1 + (step + i) % 3 for i in range(3)]
        pieces = [video[:, d : d + n] for d, n in zip(done, counts, strict=True)]
        found = Stream.push_together(streams, pieces)
        for i, (stream, logits) in enumerate(zip(streams, found, strict=True)):
            before, done[i] = done[i], done[i] + counts[i]
            first = (done[i] - FRAMES) // stream.stride * stream.stride
            due = first >= 0 and first + FRAMES > before
            assert (logits is not None) == due
            if due:
                compared += 1
                assert close(logits, expected[first])
    assert compared >= 20
    assert Stream.push_together([], []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_state_survives_a_file(dtype, video, whole, tmp_path):
    model, _ = whole("paper", dtype)
    for stride, cut in ((1, 20), (2, 17), (3, 5), (4, 0)):
        stream, other = Stream(model, stride), Stream(model, stride)
        if cut:
            stream.push(video[:, :cut])
        file = tmp_path / f"{stride}.safetensors"
        safetensors.torch.save_file(stream.state_dict(), file)
        other.load_state_dict(safetensors.torch.load_file(file))
        assert other.frames_seen == cut
        assert other.memory_bytes == stream.memory_bytes
        sizes = [1, 1, 1, 30]
        expected, found = (drain(x, video[:, :40], sizes) for x in (stream, other))
        assert expected
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[end], found[end]) for end in expected)


def test_inference_mode_may_come_and_go(video, whole):
    model, expected = whole("paper", torch.float32)
    stream, other = Stream(model), Stream(model)
    with torch.inference_mode():
        stream.push(video[:, :10])
        other.load_state_dict(stream.state_dict())
    for each in (stream, other):
        found = [each.push(frame[:, None]) for frame in video[:, 10:20].unbind(1)]
        with torch.inference_mode():
            found.append(each.push(video[:, 20:21]))
        assert close(found[-1], expected[21 - FRAMES])


def test_a_state_is_a_copy(video, whole):
    stream = Stream(whole("paper", torch.float32)[0], 1)
    stream.push(video[:, :15])
    state = stream.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    stream.load_state_dict(state)
    stream.push(video[:, 15:17])
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_a_state_that_does_not_fit_is_refused(video, whole):
    model, _ = whole("paper", torch.float32)
    stream, other = Stream(model, 1), Stream(model, 3)
    for each in (stream, other):
        each.push(video[:, :15])
    state = other.state_dict()
    for wrong, message in (
        (None, "position is not in it"),
        ({}, "position is not in it"),
        ({**state, "position": torch.zeros(5)}, "position is not in it"),
        (state, "stride 3, this stream has 1"),
        ({**stream.state_dict(), "units": torch.zeros(2, 2)}, r"units is \(2, 2\) torch.float32"),
        ({**stream.state_dict(), "last": state["last"].half()}, "torch.float16"),
        ({"position": stream.state_dict()["position"]}, "last is missing"),
        ({**stream.state_dict(), "first": torch.zeros(1)}, "first is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(wrong)
    after = stream.push(video[:, 15:16])
    assert close(after, whole("paper", torch.float32)[1][0])


def test_reset_begins_a_new_video_of_any_size(video, whole):
    model, expected = whole("published", torch.float32)
    stream = Stream(model, 1)
    stream.push(video[:, :9, :16, :20])
    stream.reset()
    assert stream.memory_bytes == 0
    assert close(stream.push(video[:, :FRAMES]), expected[0])


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.zeros(3, 1, SIZE, SIZE, dtype=torch.uint8), TypeError, "got torch.uint8"),
        ([1.0], TypeError, "got list"),
        (torch.zeros(3, SIZE, SIZE), ValueError, r"got \(3, 24, 24\)"),
        (torch.zeros(1, 3, 1, SIZE, SIZE), ValueError, r"got \(1, 3, 1, 24, 24\)"),
        (torch.zeros(1, 3, SIZE, SIZE), ValueError, r"got \(1, 3, 24, 24\)"),
        (torch.zeros(3, 0, SIZE, SIZE), ValueError, "without empty dimensions"),
        (torch.zeros(3, 1, SIZE, 30), ValueError, r"24 x 30 pixels, those before were 24 x 24"),
    ],
)
def test_bad_frames(frames, error, message, whole):
    stream = Stream(whole("paper", torch.float32)[0], 1)
    stream.push(torch.zeros(3, 1, SIZE, SIZE))
    with pytest.raises(error, match=message):
        stream.push(frames)
    assert stream.frames_seen == 1


def test_bad_arguments(video, whole):
    model, _ = whole("paper", torch.float32)
    for stride in (0, -1, 17):
        with pytest.raises(ValueError, match=f"1 to the model's 16 frames, got {stride}"):
            Stream(model, stride)
    for stride in (True, 1.0, "2"):
        with pytest.raises(TypeError, match="stride must be an integer"):
            Stream(model, stride)
    with pytest.raises(TypeError, match="got Linear"):
        Stream(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="evaluation mode"):
        Stream(make_model().train())
    with pytest.raises(ValueError, match=r"precision 'float16' does not fit .* torch.float32"):
        Stream(model, precision="float16")
    with pytest.raises(ca3d.errors.UserError, match="'int4' is not known"):
        Stream(model, precision="int4")
    trained = make_model()
    stream = Stream(trained)
    trained.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        stream.push(video[:, :1])


def test_streams_that_cannot_be_together(video, whole):
    model, _ = whole("paper", torch.float32)
    one, frame = Stream(model), video[:, :1]
    for streams, frames, message in (
        ([one], [], "1 streams and frames for 0"),
        ([one, one], [frame, frame], "given twice"),
        ([one, Stream(make_model())], [frame, frame], "share one model"),
        ([one, Stream(model, precision="bfloat16")], [frame, frame], "share one precision"),
        ([one, Stream(model)], [frame, frame[..., 1:]], "must have one size"),
    ):
        with pytest.raises(ValueError, match=message):
            Stream.push_together(streams, frames)
    assert one.frames_seen == 0


def test_uint8_frames_of_a_video_are_prepared_as_predict_does(tmp_path):
    video_file = tmp_path / "a.avi"
    write_video(video_file, bar_video("up", 1, frames=40))
    model = make_model()
    info = ca3d.weights.ModelInfo(
        "ca3d_tiny", model.options, color="bgr", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1),
        classes=tuple("abcdefg"), size=24, resize=32, stride=1,
    )  # fmt: skip
    predictor = ca3d.predict.Predictor(model, info)
    prediction = predictor.predict(video_file, overlap=15 / 16)
    stream, rows = predictor.stream(), []
    with ca3d.data.reader.open_video(video_file) as video:
        for number in range(video.num_frames):
            logits = stream.push(predictor.prepare(video.frames([number])))
            if logits is not None:
                rows.append(logits.softmax(0))
    assert len(rows) == len(prediction.windows) == 25
    assert torch.allclose(torch.stack(rows), prediction.probabilities, atol=1e-5)
    resized = predictor.prepare(torch.zeros(2, 3, 96, 70, dtype=torch.uint8))
    assert resized.shape == (3, 2, 24, 24)
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        predictor.prepare(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got \(3, 1, 8, 8\)"):
        predictor.prepare(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("preset", "shares"), [(None, (11.9, 16.6, 28.5)), ("published", (11.7, 17.6, 29.4))]
)
def test_share_of_the_clips_multiply_adds(preset, shares):
    """Of the whole model at 112 x 112, counted; on the meta device nothing is computed."""
    with torch.device("meta"):
        model = models.create("ca3d", num_classes=101, preset=preset).eval()
    clip = count_macs(model)["total"]
    found = []
    for stride in (1, 2, 4):
        stream = Stream(model, stride)
        stream.push(torch.zeros(3, FRAMES, 112, 112, device="meta"))
        counts = set()
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                stream.push(torch.zeros(3, stride, 112, 112, device="meta"))
            counts.add(counter.get_total_flops() // 2)
        assert len(counts) == 1  # no matter which phase of the pairs it is
        found.append(round(100 * counts.pop() / clip, 1))
    assert tuple(found) == shares


@pytest.mark.parametrize("preset", [None, "published"])
def test_the_whole_model(preset):
    torch.manual_seed(0)
    model = models.create("ca3d", num_classes=101, preset=preset).eval()
    video = torch.randn(3, 19, 48, 48)
    stream = Stream(model, 3)
    first, newest = stream.push(video[:, :FRAMES]), stream.push(video[:, FRAMES:])
    with torch.no_grad():
        expected = model(torch.stack([video[:, :FRAMES], video[:, 3:]]))
    for logits, clip in zip((first, newest), expected, strict=True):
        assert (logits - clip).abs().max() <= 1e-5 * clip.abs().max()
    assert not torch.allclose(first, newest)


@pytest.mark.parametrize("pool", ["paper", "published"])
def test_memory_of_a_float16_stream(pool):
    """15 pairs of 256 x 14 x 14 features, and one frame of block 2's (or of block 3's)."""
    model = models.create("ca3d", num_classes=5, pool=pool).eval()
    stream = Stream(model)
    stream.push(torch.zeros(3, 2, 112, 112))
    last = 128 * 28 * 28 if pool == "paper" else 256 * 14 * 14
    assert stream.memory_bytes == 4 * (15 * 256 * 14 * 14 + last)
    assert 1.5e6 < stream.memory_bytes / 2 < 1.8e6
