"""Names without their libraries, input that is refused, and options that can't be."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from ca3d import info, models
from ca3d.errors import UserError
from ca3d.models import create, create_for_clips, names, recipe, register

NINE = ("i3d", "r2plus1d_18", "r3d_18", "stam_b", "swin3d_t", "timesformer_b", "tubevit_b",
        "vivit_2", "x3d_xl")  # fmt: skip


def test_all_are_registered() -> None:
    assert {*NINE, "r2plus1d_18_15m"} <= set(names())
    for name in NINE:
        assert any(known.startswith(name.split("_")[0]) for known in names() if "tiny" in known)
    with pytest.raises(ValueError, match="already registered"):
        register("i3d")(create)
    with pytest.raises(ValueError, match=r"unknown model 'i3'; did you mean 'i3d'\?"):
        recipe("i3")


def test_naming_models_imports_no_library() -> None:
    code = (
        "import sys; from ca3d import models; models.names(); models.recipe('stam_b');"
        " print([m for m in ('timm', 'transformers', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "file", "module"),
    [
        ("stam_b", "stam", "timm.models.vision_transformer"),
        ("timesformer_b", "timesformer", "transformers"),
        ("r3d_18", "r3d", "torchvision.models.video.resnet"),
    ],
)
def test_a_missing_library_is_one_line(
    name: str, file: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"ca3d.models.baselines.{file}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # as if it could not be imported
    library = module.split(".")[0]
    with pytest.raises(UserError) as caught:
        create(name, 5)
    assert str(caught.value) == (
        f"model {name!r} needs the package {library}, which is missing; run: "
        'pip install "ca3d-kernels[baselines]"'
    )
    monkeypatch.setattr(models, "names", lambda: [name, "ca3d"])
    described = info.models()
    assert described == {name: str(caught.value), "ca3d": "6,950,891 parameters at 101 classes"}


def test_size_goes_to_models_that_have_it() -> None:
    options = {"width": 24, "depth": 1, "heads": 2, "patch": 8}
    assert create_for_clips("timesformer_tiny", 3, frames=4, size=24, **options).options == {
        "num_classes": 3, "frames": 4, "size": 24, **options
    }  # fmt: skip
    assert "size" not in create_for_clips("ca3d_tiny", 3, frames=4, size=24).options


@pytest.mark.parametrize("name", ["vivit_tiny", "r3d_tiny"])
def test_bad_clips(name: str) -> None:
    model = create(name, 3).eval()
    with pytest.raises(TypeError, match=r"floating-point.*torch.uint8"):
        model(torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8))
    for shape in ((3, 16, 32, 32), (1, 1, 16, 32, 32), (1, 3, 8, 32, 32), (0, 3, 16, 32, 32)):
        with pytest.raises(ValueError, match=r"clip must have the shape \(batch, 3, 16, .*, got"):
            model(torch.zeros(shape))


def test_only_tables_fix_the_size() -> None:
    clip = torch.zeros(1, 3, 16, 24, 40)
    assert create("r3d_tiny", 3).eval()(clip).shape == (1, 3)
    with pytest.raises(ValueError, match=r"\(batch, 3, 16, 32, 32\), got \(1, 3, 16, 24, 40\)"):
        create("stam_tiny", 3)(clip)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("r3d_18", {"frames": 0}, "frames must be at least 1, got 0"),
        ("r3d_18", {"widths": (64, 128)}, "widths must have four entries"),
        ("r2plus1d_18", {"depths": (2, 2, 2, 0)}, r"depths\[3\] must be at least 1, got 0"),
        ("r2plus1d_18", {"size": "112"}, "size must be an integer, got '112'"),
        ("i3d", {"width": 0.0}, "width must be above 0"),
        ("x3d_xl", {"depth": -1.0}, "depth must be above 0"),
        ("stam_b", {"size": 100}, r"size must be a multiple of patch \(16\), got 100"),
        ("stam_b", {"temporal_heads": 7}, r"width must be a multiple of heads \(7\), got 768"),
        ("timesformer_b", {"heads": 5}, r"width must be a multiple of heads \(5\), got 768"),
        ("vivit_2", {"frames": 6}, r"frames must be a multiple of tubelet \(4\), got 6"),
        ("swin3d_t", {"heads": (3, 6)}, "heads must have one entry a stage"),
        ("swin3d_t", {"width": 100}, r"heads\[0\] = 3 must divide 100 channels"),
        ("swin3d_t", {"patch": (4, 4)}, "patch must have 3 entries"),
        ("tubevit_b", {"frames": 2}, "too small for a tube"),
        ("tubevit_b", {"patch": 14}, "patch must be a multiple of 4"),
        ("x3d_xl", {"heads": 4}, "x3d_xl has no option 'heads'; it has frames, size, width, depth"),
        ("x3d_xl", {"dropout": math.nan}, "dropout must be a finite number, got nan"),
        ("stam_b", {"width": "wide"}, "width must be an integer, got 'wide'"),
        ("r2plus1d_18", {"widths": "abc"}, "widths must be a list of integers, got 'abc'"),
        ("ca3d", {"foo": 1}, "ca3d has no option 'foo'; it has .*pool"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises((ValueError, TypeError), match=message):
        create(name, 5, **options)
