"""Exported files give the model's logits in ONNX Runtime, as clips and as streams."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import shape_inference
from tiny_videos import SIDE, bar_video, write_video

import ca3d
from ca3d import weights
from ca3d.cli import main
from ca3d.errors import UserError
from ca3d.export.clips import Accuracy
from ca3d.export.onnx_files import metadata_of
from ca3d.export.onnx_runtime import OnnxClassifier, OnnxGraph, OnnxStream
from ca3d.export.options import ExportConfig
from ca3d.export.run import export
from ca3d.streaming import Stream


@pytest.fixture(scope="module")
def video():
    return torch.randn(3, 30, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_clips_equal_the_model(float32, video):
    clips = torch.stack([video[:, :8], video[:, 9:17], video[:, 22:]])
    runtime = OnnxClassifier(float32.folder)
    assert relative(runtime(clips), float32.model(clips)) < 1e-5
    assert runtime.info == float32.info
    with pytest.raises(ValueError, match=r"\(batch, 3, 8, 32, 32\) .* got \(1, 3, 7, 32, 32\)"):
        runtime(clips[:1, :, :7])


@torch.no_grad()
def test_float16_and_int8_are_near_the_model(float16, int8, float32, videos):
    from ca3d.export.clips import calibration_clips

    clips = torch.stack(calibration_clips(float32.info, str(videos), 8))
    expected = float32.model(clips)
    errors = [relative(OnnxClassifier(x.folder)(clips), expected) for x in (float32, float16, int8)]
    assert errors[0] < 1e-5 < errors[1] < 0.01
    assert 1e-3 < errors[2] < 0.2
    sizes = [(x.folder / "clip.onnx").stat().st_size for x in (float32, float16)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 8])
def test_a_stream_equals_ours(stride, float32, video):
    ours, theirs = Stream(float32.model, stride), OnnxStream(float32.folder, stride)
    due = 0
    for size in (3, 1, 6, 1, 1, 2, 9, 1, 1, 1, 2):
        frames = video[:, ours.frames_seen : ours.frames_seen + size]
        expected, found = ours.push(frames), theirs.push(frames)
        assert (expected is None) == (found is None)
        if expected is not None:
            due += 1
            assert relative(found, expected) < 1e-5
    assert due >= 2
    assert theirs.frames_seen == ours.frames_seen
    assert theirs.memory_bytes == OnnxStream(float32.folder).memory_bytes > 0


def test_an_int8_stream_of_pairs(int8, video):
    ours = Stream(int8.model, 2)
    theirs = OnnxStream(int8.folder)
    assert theirs.stride == 2
    for frames in video[:, :14].split(1, 1):
        expected, found = ours.push(frames), theirs.push(frames)
        assert (expected is None) == (found is None)
        if expected is not None:
            assert relative(found, expected) < 0.5
    assert OnnxStream(int8.folder, 6).stride == 6
    with pytest.raises(UserError, match="from 1 to 8 frames and even, got 3"):
        OnnxStream(int8.folder, 3)


def test_what_int8_is(int8):
    graph = onnx.load(int8.folder / "clip.onnx").graph
    producers = {name: node for node in graph.node for name in node.output}
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    kinds = {"spatial": 0, "temporal": 0}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        source = producers.get(node.input[1])
        if source is None:
            kinds["temporal"] += 1
            continue
        kinds["spatial"] += 1
        assert source.op_type == "DequantizeLinear"
        weight, scale = (constants[name] for name in source.input[:2])
        assert weight.dtype == np.int8
        assert scale.shape == (len(weight),)
    # Four halves of one convolution and two; two of a projection and two.
    assert kinds == {"spatial": 12, "temporal": 6}


def test_files_hold_four_dimensions_and_no_paths(float32):
    for part in ("clip", "encoder", "head"):
        file = float32.folder / f"{part}.onnx"
        proto = onnx.load(file)
        inferred = shape_inference.infer_shapes(proto, strict_mode=True)
        ranks = [len(x.type.tensor_type.shape.dim) for x in inferred.graph.value_info]
        assert len(ranks) >= len(proto.graph.node) - 2
        assert max(ranks) == 4
        assert __file__.split("/tests/")[0].encode() not in file.read_bytes()


def test_the_report(float32, int8):
    saved = json.loads((float32.folder / "export.json").read_text())
    assert saved == json.loads(json.dumps(float32.result.to_dict()))
    assert sorted(x.name for x in float32.folder.iterdir()) == [
        "clip.onnx", "encoder.onnx", "export.json", "head.onnx",
    ]  # fmt: skip
    clip, stream = float32.result.comparisons
    assert clip.same_class == stream.same_class == 1
    assert max(clip.difference / clip.scale, stream.difference / stream.scale) < 1e-5
    assert clip.bytes == (float32.folder / "clip.onnx").stat().st_size
    assert int8.result.accuracy.clips == 60
    assert 0 < int8.result.accuracy.agreement <= 1


def test_predict_by_onnx_runtime(float32, weights_path, tmp_path, capsys):
    video = tmp_path / "a.avi"
    write_video(video, bar_video("down", 5, frames=20))
    expected = ca3d.load(weights_path).predict(video)
    for place in (float32.folder, float32.folder / "clip.onnx"):
        found = ca3d.load(place, runtime="onnx").predict(video)
        assert torch.allclose(found.probabilities, expected.probabilities, atol=1e-5)
        assert found.classes == ("down", "up")
    words = ["predict", str(video), "--weights", str(float32.folder), "--runtime", "onnx", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["labels"][0]["name"] == expected.labels[0].name


def test_float16_predicts_from_float32_frames(float16, weights_path, tmp_path):
    video = tmp_path / "a.avi"
    write_video(video, bar_video("up", 6, frames=8))
    expected = ca3d.load(weights_path).predict(video).probabilities
    found = ca3d.load(float16.folder, runtime="onnx").predict(video).probabilities
    assert torch.allclose(found, expected, atol=0.02)


def test_other_models_are_exported_as_clips(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv3d(3, 4, 3)
            self.classifier = torch.nn.Linear(4, 2)

        def forward(self, clips):
            return self.classifier(self.conv(clips).relu().mean((2, 3, 4)))

    from ca3d.models import registry

    registry.register("plain_for_export")(lambda num_classes: Plain())
    try:
        model = registry.create("plain_for_export", 2)
        info = weights.ModelInfo("plain_for_export", model.options, size=8, resize=8, frames=4)
        file = tmp_path / "plain.safetensors"
        weights.save(file, model, info)
        options = {"weights": str(file), "rounds": 1, "threads": 1}
        result = export(ExportConfig("onnx", out=str(tmp_path / "out"), **options))
        assert result.comparisons[0].difference < 1e-5
        for more, message in (
            ({"stream": True}, "--stream: plain_for_export has no part that sees single frames"),
            ({"format": "executorch"}, "plain_for_export has 3-D convolutions"),
        ):
            config = ExportConfig(**{"format": "onnx", **options, **more}, out=str(tmp_path / "no"))
            with pytest.raises(UserError, match=message):
                export(config)
    finally:
        del registry._builders["plain_for_export"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tflite", "W", "--out", "OUT"], "FORMAT must be one of onnx, executorch, not 'tflite'"),
        (["onnx", "missing.safetensors", "--out", "OUT"], "missing.safetensors: no such file"),
        (["onnx", "W", "--out", "OUT", "--precision", "int8"], "needs --calibration DATA"),
        (["onnx", "W", "--out", "OUT", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (
            ["onnx", "W", "--out", "OUT", "--stream", "--stride", "9"],
            "--stride must be from 1 to the model's 8 frames, not 9",
        ),
        (["executorch", "W", "--out", "OUT", "--stream"], "--stream is for ONNX only"),
        (
            ["executorch", "W", "--out", "OUT", "--precision", "int8", "--calibration", "x"],
            "--precision int8 is for ONNX only",
        ),
        (["onnx", "W", "--out", "DONE"], "export.json: exist already; --force replaces them"),
    ],
)
def test_bad_options(words, message, weights_path, tmp_path, capsys):
    done = tmp_path / "done"
    done.mkdir()
    for name in ("clip.onnx", "export.json"):
        (done / name).write_text("mine")
    places = {"W": str(weights_path), "OUT": str(tmp_path / "out"), "DONE": str(done)}
    assert main(["export", *(places.get(word, word) for word in words)]) == 1
    assert message in capsys.readouterr().err
    assert (done / "clip.onnx").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_force_replaces_files(weights_path, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "clip.onnx").write_text("old")
    config = ExportConfig(
        "onnx", str(weights_path), str(out), force=True, size=16, rounds=1, threads=1
    )
    export(config)
    assert OnnxClassifier(out).graph.inputs == {"frames": (8, 3, 16, 16)}
    assert OnnxClassifier(out).info.size == 16


def test_bad_files(float32, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    foreign = onnx.load(float32.folder / "clip.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    newer = dict(metadata_of(float32.info, "clip"), **{"ca3d.version": "99"})
    onnx.helper.set_model_props(foreign, newer)
    onnx.save(foreign, tmp_path / "newer.onnx")
    damaged = dict(metadata_of(float32.info, "clip"), **{"ca3d.info": '{"model": 3}'})
    onnx.helper.set_model_props(foreign, damaged)
    onnx.save(foreign, tmp_path / "damaged.onnx")
    for name, message in (
        ("missing.onnx", "no such file"),
        ("text.onnx", "ONNX Runtime can't read it"),
        ("foreign.onnx", "not one of `ca3d export`"),
        ("newer.onnx", "has format version 99, this ca3d reads 1"),
        ("damaged.onnx", "its description is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            OnnxGraph(tmp_path / name)
    with pytest.raises(UserError, match="the head of a stream, not a model of whole clips"):
        OnnxClassifier(float32.folder / "head.onnx")
    with pytest.raises(UserError, match="holds no stream"):
        OnnxStream(tmp_path)
    with pytest.raises(UserError, match="use it with --runtime onnx"):
        ca3d.load(float32.folder / "clip.onnx")
    with pytest.raises(UserError, match="on the CPU here, not on cuda"):
        ca3d.load(float32.folder, "cuda", "onnx")
    with pytest.raises(ValueError, match="runtime must be torch or onnx, got 'tensorrt'"):
        ca3d.load(float32.folder, runtime="tensorrt")


def test_parts_of_two_exports_are_refused(float32, weights_path, tmp_path):
    for part in ("encoder", "head"):
        shutil.copy(float32.folder / f"{part}.onnx", tmp_path)
    head = onnx.load(tmp_path / "head.onnx")
    info = weights.ModelInfo("ca3d_tiny", float32.info.options)
    onnx.helper.set_model_props(head, metadata_of(info, "head"))
    onnx.save(head, tmp_path / "head.onnx")
    with pytest.raises(UserError, match="different exports"):
        OnnxStream(tmp_path)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.zeros(3, 1, SIDE, SIDE, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (torch.zeros(3, SIDE, SIDE), ValueError, r"got \(3, 32, 32\)"),
        (torch.zeros(3, 1, SIDE, 30), ValueError, "32 x 32 pixels of the export"),
    ],
)
def test_bad_frames(frames, error, message, float32):
    with pytest.raises(error, match=message):
        OnnxStream(float32.folder).push(frames)


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package, weights_path, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnxruntime":
        with pytest.raises(UserError, match=r"onnxruntime is needed .*ca3d-kernels\[onnx\]"):
            OnnxGraph(weights_path)
    assert main(["export", "onnx", str(weights_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert package in error
    assert "ca3d-kernels[onnx]" in error


def test_accuracy_is_paired():
    labels = torch.arange(4).repeat(50)
    reference, exported = labels.clone(), labels.clone()
    reference[:10] = -1
    exported[5:12] = -2
    found = Accuracy.of(reference, exported, labels)
    assert found.clips == 200
    assert (found.reference, found.exported) == (0.95, 0.965)
    assert found.difference == pytest.approx(3 / 200)
    # 5 clips only the exported model has right, 2 only the reference.
    assert found.margin == pytest.approx(1.96 * (7 - 9 / 200) ** 0.5 / 200)
    assert found.agreement == 188 / 200
