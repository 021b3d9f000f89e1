"""Counts, options, sizes, the split for streams, initial values, and bad input."""

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.models import CA3D, ca3d_tiny, count_macs, create, names, register
from ca3d.models.initialization import initialize
from ca3d.models.registry import _builders
from ca3d_kernels import norm_relu, norm_relu_conv


def on_meta(name: str, num_classes: int = 101, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, num_classes, **options)


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("ca3d", 101, 6_950_891),
        ("ca3d", 51, 6_925_241),
        ("ca3d", 400, 7_104_278),
        ("ca3d_l", 101, 17_807_339),
        ("ca3d_l", 51, 17_781_689),
        ("ca3d_l", 400, 17_960_726),
    ],
)
def test_number_of_parameters(name: str, num_classes: int, count: int) -> None:
    for options in ({}, {"preset": "published"}):
        model = on_meta(name, num_classes, **options)
        assert sum(p.numel() for p in model.parameters()) == count


def test_dense_projections_add_parameters() -> None:
    def count(**options: Any) -> int:
        return sum(p.numel() for p in on_meta("ca3d", **options).parameters())

    heads = ((256, 4), (512, 8))
    extra = sum(3 * width * (width - width // head) for width, head in heads)
    assert count(dense_qkv=True) - count() == extra


# Total, of the published model by fvcore, which counts a batch normalisation as two operations an
# element and knows the windows' copies as convolutions with an identity kernel; we make no copies.
@pytest.mark.parametrize(
    ("name", "options", "fvcore"),
    [
        ("ca3d", {"preset": "published"}, 26.146e9),
        ("ca3d", {}, 21.457e9),
        ("ca3d_l", {"preset": "published"}, 36.876e9),
    ],
)
def test_multiply_adds(name: str, options: dict[str, Any], fvcore: float) -> None:
    model = on_meta(name, **options)
    normalised = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        nonlocal normalised
        normalised += inputs[0].numel()

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(count)
    macs = count_macs(model)
    windows = 2 * 5 * 5 * (256 * 8 * 14 * 14 + 512 * 4 * 7 * 7)
    assert macs["total"] + 2 * normalised + windows == pytest.approx(fvcore, abs=0.0005e9)
    assert macs["local_attention_packed"] == 2 * 5 * (256 * 8 * 14 * 14 + 512 * 4 * 7 * 7)
    assert model.training


def test_backward_of_attention_is_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = ca3d_tiny(3).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 16, 16, 16)).sum().backward()
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    forward = flops["ca3d.local_attention_packed"]
    assert flops["ca3d.local_attention_packed_backward"] == 2.5 * forward > 0


def test_fused_convolutions_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    y = torch.randn(2, 4, 6, 6, requires_grad=True)
    one, weight = torch.ones(4, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)
    options: dict[str, Any] = {"stride": 2, "padding": 1}
    counts = []
    for run in (
        lambda: norm_relu_conv(y, one, one, weight, **options).output,
        lambda: F.conv2d(F.relu(y), weight, **options),
        lambda: norm_relu(y, one, one).z,
    ):
        with FlopCounterMode(display=False) as counter:
            run().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert counts[2] == 0


def test_registry() -> None:
    assert {"ca3d", "ca3d_l", "ca3d_tiny"} <= set(names())
    with pytest.raises(ValueError, match=r"unknown model 'ca3d_tinny'; did you mean 'ca3d_tiny'\?"):
        create("ca3d_tinny", 5)
    for wrong in (0, -1, 2.0, "5", True, None):
        with pytest.raises(ValueError, match="num_classes must be"):
            create("ca3d_tiny", wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already registered"):
        register("ca3d")(ca3d_tiny)
    with pytest.raises(TypeError, match="depth"):
        create("ca3d_tiny", 5, depth=3)


def test_a_plain_module_gets_name_and_options() -> None:
    @register("test_linear")
    def build(num_classes: int, bias: bool = True) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes, bias))
        model.classifier = model[-1]
        return model

    try:
        model = create("test_linear", 3, bias=False)
        assert model.name == "test_linear"
        assert model.options == {"num_classes": 3, "bias": False}
    finally:
        del _builders["test_linear"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ca3d_tiny", {}),
        ("ca3d_tiny", {"preset": "published", "pool": "paper", "frames": 8, "dropout": 0.25}),
        ("ca3d_tiny", {"widths": (4, 8), "spatial_depths": (0, 1), "temporal_depths": (0, 1),
                       "spatial_heads": (1, 2), "temporal_heads": (0, 2)}),
        ("ca3d_l", {"widths": [8, 16, 32, 64], "dense_qkv": True, "kernel_size": 3}),
    ],
)  # fmt: skip
def test_options_rebuild_the_model(name: str, options: dict[str, Any]) -> None:
    model = create(name, 7, **options)
    rebuilt = create(model.name, **json.loads(json.dumps(model.options)))
    assert rebuilt.options == model.options
    assert rebuilt.load_state_dict(model.state_dict()).missing_keys == []
    for option, value in options.items():
        assert model.options[option] == (list(value) if isinstance(value, tuple) else value)
    clip = torch.randn(2, 3, model.frames, 20, 24)
    assert torch.equal(rebuilt.eval()(clip), model.eval()(clip))


@pytest.mark.parametrize("pool", ["paper", "published"])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (15, 16), (33, 50)])
@pytest.mark.parametrize("frames", [1, 2, 4, 12])
def test_any_size(pool: str, size: tuple[int, int], frames: int) -> None:
    model = ca3d_tiny(5, frames=frames, pool=pool)
    clip = torch.randn(2, 3, frames, *size)
    assert model(clip).shape == (2, 5)
    with torch.no_grad():
        logits = model.eval()(clip)
        assert logits.isfinite().all()
        assert torch.allclose(model(clip[:1]), logits[:1], atol=1e-5)


@pytest.mark.parametrize("pool", ["paper", "published"])
def test_parts_add_up(pool: str) -> None:
    model = ca3d_tiny(5, pool=pool).eval()
    clip = torch.randn(1, 3, 16, 32, 32)
    with torch.no_grad():
        expected = model(clip)
        frames = torch.cat([model.encode_frames(clip[:, :, t : t + 1]) for t in range(16)], 2)
        pairs = torch.cat([model.encode_pairs(frames[:, :, t : t + 2]) for t in range(0, 16, 2)], 2)
        features = model.encode_clip(pairs)
        assert frames.shape[1:3] == ((16, 16) if pool == "paper" else (32, 16))
        assert pairs.shape[1:3] == (32, 8)
        assert features.shape == (1, 64, 4, 2, 2)
        assert torch.allclose(model.classify(features), expected, atol=1e-5)


def test_layers_by_pool() -> None:
    paper, published = (list(ca3d_tiny(2, pool=pool).layers) for pool in ("paper", "published"))
    assert paper == [
        "spatial1", "spatial2", "pool3", "spatial3", "position", "temporal3",
        "pool4", "spatial4", "temporal4",
    ]  # fmt: skip
    assert sorted(published) == sorted(paper)
    assert published.index("pool3") == published.index("spatial3") + 1
    assert published.index("pool4") == published.index("spatial4") + 1


def test_defaults_differ_from_published_only_by_the_preset() -> None:
    state = ca3d_tiny(5).state_dict()
    clip, logits = torch.randn(2, 3, 16, 32, 32), []
    overrides = ({}, {"pool": "paper"}, {"edge": "zero"}, {"scale": "linear"}, {"keys": "own"})
    for options in ({}, *({"preset": "published", **o} for o in overrides)):
        if options.get("keys") == "published" and options.get("edge") != "zero":
            continue
        model = ca3d_tiny(5, **options).eval()
        model.load_state_dict(state)
        # Without its residual columns a fresh model hardly depends on its attention.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("qkv_weight"):
                    parameter.mul_(20)
        logits.append(model(clip))
    assert torch.equal(logits[1], logits[3])  # zero edges are the preset's own
    different = [logits[0], logits[1], logits[2], logits[5]]
    for i, a in enumerate(different):
        assert all(not torch.allclose(a, b, rtol=1e-4) for b in different[:i])


def test_initial_values() -> None:
    model = create("ca3d", 101)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in, fan_out = module.weight[0].numel(), module.weight.shape[0]
            std = math.sqrt(2 / (fan_in + fan_out))
            assert module.weight.std().item() == pytest.approx(std, rel=0.05)
            assert module.bias is not None
            assert not module.bias.any()
    qkv = model.layers["temporal3"].attention.qkv_weight
    assert qkv.std().item() == pytest.approx(math.sqrt(2 / (64 + 768)), rel=0.05)
    table = model.layers["position"].weight
    assert table.std().item() == pytest.approx(math.sqrt(2 / (256 + 8)), rel=0.1)
    assert model.classifier.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.05)
    assert model.classifier.bias.abs().max() <= 512**-0.5


def test_initial_values_follow_the_generator() -> None:
    model = ca3d_tiny(5)
    initialize(model, torch.Generator().manual_seed(3))
    first = copy.deepcopy(model.state_dict())
    initialize(model, torch.Generator().manual_seed(3))
    assert all(torch.equal(first[key], value) for key, value in model.state_dict().items())
    torch.manual_seed(5)
    a = ca3d_tiny(5)
    torch.manual_seed(5)
    b = ca3d_tiny(5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_evaluation_is_deterministic() -> None:
    model, clip = ca3d_tiny(5).eval(), torch.randn(2, 3, 16, 32, 32)
    with torch.no_grad():
        first = model(clip)
        assert torch.equal(model(clip), first)
        # Another layout of the same values is converted on entry.
        assert torch.equal(model(clip.to(memory_format=torch.channels_last_3d)), first)
        assert torch.equal(model(clip.transpose(3, 4).contiguous().transpose(3, 4)), first)


def test_training_needs_two_clips() -> None:
    model = ca3d_tiny(5)
    with pytest.raises(ValueError, match="at least 2 clips, got 1"):
        model(torch.randn(1, 3, 16, 32, 32))
    model.head.norm.eval()
    assert model(torch.randn(1, 3, 16, 32, 32)).shape == (1, 5)


def test_bad_clips() -> None:
    model = ca3d_tiny(5).eval()
    with pytest.raises(TypeError, match=r"floating-point.*torch.uint8"):
        model(torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"the model's dtype torch.float32, got torch.float64"):
        model(torch.zeros(2, 3, 16, 32, 32, dtype=torch.float64))
    with pytest.raises(TypeError, match="list"):
        model([1.0])  # type: ignore[arg-type]
    for shape in ((3, 16, 32, 32), (1, 1, 16, 32, 32), (0, 3, 16, 32, 32), (1, 3, 16, 0, 32)):
        with pytest.raises(ValueError, match=r"\(batch, 3, frames, height, width\)"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"clips of 16 frames, got 8 .*frames=8"):
        model(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ValueError, match="table holds 8 frames, got 7"):
        model.encode_clip(torch.zeros(1, 32, 7, 4, 4))
    with pytest.raises(ValueError, match="even number of frames, got 3"):
        model.encode_pairs(torch.zeros(1, 16, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 6}, "halve evenly"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"frames": 4.0}, "frames must be an integer"),
        ({"preset": "paper"}, "preset must be None or 'published', got 'paper'"),
        ({"pool": "max"}, "pool must be one of 'paper', 'published', got 'max'"),
        ({"edge": "wrap"}, "edge must be one of"),
        ({"scale": 0.1}, "scale must be one of"),
        ({"keys": "published"}, "key_table needs edge='zero'"),
        ({"widths": (8, 16)}, "one entry for each block"),
        ({"widths": "8, 16"}, "widths must be a sequence"),
        ({"widths": (8, 16, 32, 0)}, "every entry of widths must be at least 1, got 0"),
        ({"temporal_heads": (0, 0, 5, 8)}, r"temporal_heads\[2\] = 5 must divide widths\[2\] = 32"),
        ({"spatial_heads": (2, 1, 1, 4)}, r"spatial_heads\[0\] = 2 must divide"),
        ({"preset": "published", "temporal_heads": (0, 0, 4, 2)}, "multiple of the spatial"),
        ({"dropout": 1.5}, "dropout must be a probability"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"stem_kernel": 4}, "stem_kernel must be odd"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"norm_momentum": -1.0}, "norm_momentum must be"),
        ({"dense_qkv": 1}, "dense_qkv must be True or False"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ca3d_tiny(5, **options)


def test_no_three_dimensional_convolution() -> None:
    for name in ("ca3d", "ca3d_l", "ca3d_tiny"):
        model = on_meta(name)
        assert isinstance(model, CA3D)
        assert not any(isinstance(module, nn.Conv3d) for module in model.modules())
