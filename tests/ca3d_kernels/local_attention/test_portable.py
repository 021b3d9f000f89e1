"""The portable form of the layer, in torch's own operators, equals the layer."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ca3d_kernels import LocalTemporalAttention, published_key_table

WINDOWS = [
    {"edge": edge, "kernel_size": size, "dilation": dilation}
    for edge, size, dilation in itertools.product(("truncate", "zero", "shift"), (1, 4, 5), (1, 2))
]
WINDOWS += [{"causal": True}, {"scale": 0.3}, {"preset": "published"}, {"bias": False}]
WINDOWS += [{"edge": "zero", "key_table": published_key_table(4, 5, [0, 2, 1, 3])}]


class OnlyTorch(TorchDispatchMode):
    """Refuses ops of other libraries."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_equals_the_layer(frames, options, dense):
    torch.manual_seed(0)
    layer = LocalTemporalAttention(16, heads=4, dense_qkv=dense, **options).double()
    if layer.qkv_bias is not None:
        torch.nn.init.normal_(layer.qkv_bias)
    x = torch.randn(1, 16, frames, 6, dtype=torch.float64)
    for each in (layer, layer.fold(torch.randn(16), torch.randn(16), torch.randn(16, frames))):
        with torch.no_grad():
            expected = each(x.unsqueeze(4)).squeeze(4)
            portable = each.portable(frames)
            with OnlyTorch():
                found = portable(x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not any(p.requires_grad for p in portable.parameters())


def test_what_it_refuses():
    layer = LocalTemporalAttention(8, heads=2)
    with pytest.raises(ValueError, match="out_proj=False"):
        LocalTemporalAttention(8, heads=2, out_proj=True).portable(4)
    with pytest.raises(ValueError, match="frames must be"):
        layer.portable(0)
    folded = layer.fold(torch.ones(8), torch.zeros(8), torch.zeros(8, 4))
    with pytest.raises(ValueError, match="frames must be the 4 of the bias, got 5"):
        folded.portable(5)
