"""Converting published weights: formats, detection, and all that can be wrong with a file."""

import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_weights import (
    golden,
    golden_model,
    state_dict,
    with_pre_parameters,
    with_second_names,
)
from torch import Tensor

from ca3d import weights
from ca3d.convert import convert, read_published
from ca3d.errors import UserError
from ca3d.models import CA3D, create
from ca3d.models.published import canonical_name, detect, entries, from_published

CLASSES = [f"class {i}" for i in range(101)]


@cache
def unique(case: str = "ca3d") -> dict[str, Tensor]:
    return state_dict(golden_model(case), seed=20250519)


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "form",
    [
        "plain",
        pytest.param("second names", marks=pytest.mark.slow),
        pytest.param("pre-parameters", marks=pytest.mark.slow),
        "checkpoint",  # holds all of them
    ],
)
def test_published_formats(tmp_path: Path, form: str) -> None:
    state: Any = unique()
    assert len(state) == 137 + 111
    if form != "plain":
        state = with_second_names(state)
        assert len(state) == 488
    if form in ("pre-parameters", "checkpoint"):
        state = state | with_pre_parameters(unique())
        assert len(state) == 625
    if form == "checkpoint":
        state = {
            "epoch": 3,
            "model_dict": state,
            "opt_dict": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "results": {"train": [np.float64(0.5)], "curve": np.arange(3.0)},
            "best_epoch": 2,
            "rng_state": {"torch": torch.get_rng_state(), "numpy": np.random.get_state()},
        }
    source, out = write(tmp_path / "in.pt", state), tmp_path / "out.safetensors"
    info = convert(source, out, classes=CLASSES, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    assert (info.model, info.color, info.frames) == ("ca3d", "bgr", 8)
    assert info.options["preset"] == "published"
    model, found = weights.load(out)
    assert found == info
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected_state = from_published(unique(), golden_model("ca3d"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected_state[key].to(value.dtype)), key
    if form != "plain":
        return
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(golden("ca3d")["x"]).double())
    expected = torch.from_numpy(golden("ca3d")["eval_logits"])
    assert (logits - expected).abs().max() < 1e-9 * expected.abs().max()


def test_the_large_model(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in unique("ca3d_l").items()}
    out = tmp_path / "out.safetensors"
    info = convert(write(tmp_path / "in.pt", state), out)
    assert info.model == "ca3d_l"
    model, found = weights.load(out)
    assert found == info
    for key, value in from_published(state, golden_model("ca3d_l")).items():
        assert torch.equal(model.state_dict()[key], value.to(model.state_dict()[key].dtype)), key


@pytest.mark.parametrize(
    "case", ["ca3d", "ca3d_paper_pool", pytest.param("ca3d_l", marks=pytest.mark.slow)]
)
def test_detection(case: str) -> None:
    name, options = detect(unique(case))
    expected = golden_model(case)
    found = create(name, **options)
    assert isinstance(found, CA3D)
    assert (found.name, list(found.layers)) == (expected.name, list(expected.layers))
    assert found.state_dict().keys() == expected.state_dict().keys()


def test_every_value_arrives_once() -> None:
    """The conversion permutes: nothing is lost, doubled or left at its initial value."""
    model = golden_model("ca3d")
    numbered, start = {}, 0
    for entry in entries(model):
        count = int(np.prod(entry.shape))
        numbered[entry.published] = torch.arange(start, start + count).double().view(entry.shape)
        start += count
    converted = from_published(numbered, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    values = torch.cat([value.flatten() for value in converted.values()])
    assert torch.equal(values.sort().values, torch.arange(start).double())


def test_names_and_parameters_of_the_golden_file() -> None:
    for case in ("ca3d", "ca3d_paper_pool", "ca3d_l"):
        model = golden_model(case)
        parameters = dict(model.named_parameters())
        found = {e.published for e in entries(model) if e.ours in parameters}
        assert found == set(golden(case)["param_names"])


def test_second_names() -> None:
    first = set(unique())
    second = set(with_second_names(unique())) - first
    assert len(second) == 240
    assert {canonical_name(name) for name in second} <= first
    assert {canonical_name(name) for name in first} == first


def test_precision(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.pt", unique()), tmp_path / "out.safetensors"
    info = convert(source, out, precision="float16")
    assert info.precision == "float16"
    assert (info.classes, info.mean, info.std) == ((), None, None)
    model, _ = weights.load(out)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def altered(**changes: Tensor | None) -> dict[str, Tensor]:
    state = dict(unique())
    for name, value in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if value is not None:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict, "no published CA3D model: clf.weight and layer_list.4.pos_embed are missing"),
        (lambda: [1, 2], "holds no state dict but a list"),
        (lambda: {1: torch.ones(1)}, "holds no state dict"),
        (lambda: torch.ones(3), "holds no state dict but a Tensor"),
        (lambda: altered(clf__bias=None), r"1 missing \(clf.bias\)"),
        (
            lambda: altered(clf__bias=torch.ones(7), layer_list__11__norm__weight=None),
            r"1 missing \(layer_list.11.norm.weight\); 1 of the wrong shape "
            r"\(clf.bias: \(7,\) instead of \(101,\)\)",
        ),
        (lambda: altered(stranger=torch.ones(1)), r"1 unexpected \(stranger\)"),
        (lambda: altered(clf__bias="text"), r"1 unexpected \(clf.bias\)"),
        (
            lambda: altered(layer_list__0__proj__block__conv1__bias=torch.zeros(1, 64)),
            "1 contradicting.*conv1.bias differs from layer_list.0.proj.block.conv.bias",
        ),
        (
            lambda: {k: v for k, v in unique().items() if ".proj.layer_list.1." not in k},
            "columns of depth",
        ),
        (
            lambda: {k: v for k, v in unique().items() if not k.startswith("layer_list.0.")},
            "columns of depth",
        ),
        (
            lambda: {k: v for k, v in unique().items() if "norm" not in k},
            r"185 missing \(.* and 177 more\)",
        ),
        (lambda: altered(clf__bias=torch.full((101,), torch.nan)), "not finite.*classifier.bias"),
        *(
            (lambda x=x: altered(clf__bias=x), "1 no dense floating-point tensor .clf.bias: torch")
            for x in (
                torch.zeros(101, dtype=torch.complex64),
                torch.zeros(101, dtype=torch.int64),
                torch.zeros(101).to_sparse(),
                torch.zeros(101, device="meta"),
            )
        ),
    ],
)
def test_wrong_content(tmp_path: Path, content: Any, message: str) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    source = write(tmp_path / "in.pt", content())
    with pytest.raises(UserError, match=message) as caught:
        convert(source, out)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ca3d_l"}, "holds the model 'ca3d', not 'ca3d_l'"),
        ({"frames": 16}, "its clips have 8 frames, not 16"),
        ({"classes": ["a", "b"]}, "the model has 101 classes, got 2"),
        ({"mean": (1, 2)}, "mean must be three numbers"),
        ({"std": (0, 1, 1)}, r"std must be three numbers in \[1e-06, 1\]"),
        ({"mean": (114, 110, 100)}, r"mean must be three numbers in \[0, 1\]"),
        ({"resize": 100}, r"resize must be at least size \(112\), got 100"),
        ({"color": "grey"}, "color must be"),
        ({"precision": "int8"}, "precision must be one of"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "in.pt", unique())
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out.safetensors", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pt", unique())
    before = source.read_bytes()
    with pytest.raises(UserError, match="is the file to convert"):
        convert(source, tmp_path / "." / "in.pt")
    assert source.read_bytes() == before


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    state = {k: v.float() if v.is_floating_point() else v for k, v in unique().items()}
    state["clf.bias"] = torch.full((101,), 1e6)
    source = write(tmp_path / "in.pt", state)
    with pytest.raises(UserError, match=r"not finite in float16.*classifier.bias"):
        convert(source, tmp_path / "out.safetensors", precision="float16")
    assert convert(source, tmp_path / "out.safetensors").precision == "float32"


class Trap:
    """An object whose loading would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    source = write(tmp_path / "in.pt", {"clf.weight": Trap(target)})
    with pytest.raises(UserError, match="can be read safely"):
        convert(source, tmp_path / "out.safetensors")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(target)))
    with pytest.raises(UserError, match="can be read safely"):
        read_published(tmp_path / "raw.pt")
    assert not target.exists()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "none.pt", tmp_path / "out")
    for name, content in (("empty", b""), ("text", b"hello"), ("zip", b"PK\x03\x04 broken")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            convert(tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        convert(tmp_path, tmp_path / "out")


def test_result_that_cannot_be_written(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pt", unique())
    with pytest.raises(UserError, match="cannot write"):
        convert(source, tmp_path / "none" / "out.safetensors")
