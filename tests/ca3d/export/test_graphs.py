"""The graphs compute what the model does, in four dimensions at most."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ca3d
from ca3d import models
from ca3d.export.graphs import Clip, graphs_of

SIZE = 24
OPTIONS = [
    {},
    {"pool": "published"},
    {"preset": "published"},
    {"edge": "shift"},
    {"dense_qkv": True},
    {"temporal_heads": (0, 0, 0, 0)},
    {"temporal_heads": (0, 2, 0, 4), "temporal_depths": (0, 1, 0, 1)},
    {"frames": 1},
    {"frames": 2},
]


class LargestRank(TorchDispatchMode):
    """Watches how many dimensions any result has."""

    rank = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.rank = max(self.rank, x.dim())
        return result


def make_model(**options):
    torch.manual_seed(3)
    model = models.create("ca3d_tiny", num_classes=7, widths=(8, 8, 16, 16), **options).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1.5, 1.5)
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_clip_and_stream_equal_the_model(options):
    model = make_model(**options)
    fused = ca3d.fuse(model, portable=True)
    frames = torch.randn(model.frames, 3, SIZE, SIZE)
    expected = model(frames.transpose(0, 1)[None])
    tolerance = 1e-5 * float(expected.abs().max().clamp(min=1))
    ranks = LargestRank()
    for stride in (1, 2):
        graphs = graphs_of(fused, SIZE, stride)
        with ranks:
            found = graphs["clip"][0](frames)
        assert (found - expected).abs().max() <= tolerance
        encoder, inputs, _ = graphs["encoder"]
        units, last = [], inputs.get("last")
        with ranks:
            for new in frames.split(len(inputs["frames"])):
                unit, *rest = encoder(new) if last is None else encoder(new, last)
                last = rest[0] if rest else None
                units.append(unit)
            joined = torch.cat(units[:: -model.frames_per_unit if rest else -1][::-1])
            found = graphs["head"][0](joined)
        assert joined.shape == graphs["head"][1]["units"].shape
        assert (found - expected).abs().max() <= tolerance
    assert ranks.rank == 4


def test_only_portable_models_are_taken():
    with pytest.raises(ValueError, match="portable=True"):
        Clip(ca3d.fuse(make_model()))


def test_shapes_of_float16_are_found_without_computing():
    fused = ca3d.fuse(make_model(), portable=True).half()
    graphs = graphs_of(fused, 32, 1)
    assert graphs["clip"][1]["frames"].dtype == torch.float32
    assert graphs["encoder"][1]["last"].dtype == torch.float16
    assert graphs["head"][1]["units"].shape == (8, 16, 4, 4)
