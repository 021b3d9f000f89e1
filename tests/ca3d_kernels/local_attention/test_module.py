"""The layer: the published module, copies, parameters, and bad input."""

import copy
import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import backends_here, threads
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ca3d_kernels import (
    LocalTemporalAttention,
    local_temporal_attention,
    published_key_table,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "published_local_attention.npz"
CASES = ("H1_K5_T8", "H2_K3_T4", "H2_K5_T8", "H2_K5_T9", "H2_K7_T4", "H2_K7_T16",
         "H4_K3_T8", "H4_K5_T8", "H4_K7_T8")  # fmt: skip
backend_parameter = pytest.mark.parametrize("backend", backends_here())


def to_our_channels(x: Tensor, heads: int) -> Tensor:
    """From the published channel order (i * heads + h) to ours (h * head_dim + i)."""
    return x.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)


def golden(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        names = [name for name in file.files if name.startswith(case + "/")]
        arrays = {name.split("/")[1]: torch.from_numpy(file[name]).double() for name in names}
    heads = len(arrays["weight"])
    return {name: to_our_channels(x, heads) if x.dim() == 5 else x for name, x in arrays.items()}


def layer_of(arrays: dict[str, Tensor], case: str, backend: str, **options: object) -> nn.Module:
    heads, kernel_size = len(arrays["weight"]), int(case.split("_")[1][1:])
    layer = LocalTemporalAttention(
        arrays["x"].shape[1], heads, kernel_size, backend=backend, **options
    ).double()
    layer.load_state_dict({"qkv_weight": arrays["weight"], "qkv_bias": arrays["bias"]})
    return layer


@backend_parameter
@pytest.mark.parametrize("case", CASES)
def test_published_preset_equals_the_published_module(case: str, backend: str) -> None:
    arrays = golden(case)
    layer = layer_of(arrays, case, backend, preset="published")
    x = arrays["x"].requires_grad_()
    output = layer(x)
    output.backward(arrays["grad_output"])
    for ours, name in (
        (output, "output"),
        (x.grad, "grad_x"),
        (layer.qkv_weight.grad, "grad_weight"),
        (layer.qkv_bias.grad, "grad_bias"),
    ):
        torch.testing.assert_close(ours, arrays[name], rtol=1e-10, atol=1e-10)


@backend_parameter
@pytest.mark.parametrize("case", CASES)
def test_without_the_table_heads_keep_to_themselves(case: str, backend: str) -> None:
    arrays = golden(case)
    head_dim = arrays["weight"].shape[-1]
    layer = layer_of(arrays, case, backend, edge="zero", scale=1 / head_dim)
    torch.testing.assert_close(
        layer(arrays["x"]), arrays["output_own_heads"], rtol=1e-10, atol=1e-10
    )


@backend_parameter
@pytest.mark.parametrize("dense", [False, True], ids=["per head", "dense"])
def test_equals_its_parts(dense: bool, backend: str) -> None:
    layer = LocalTemporalAttention(
        12, 3, 3, dilation=2, causal=True, dense_qkv=dense, out_proj=True, backend=backend
    ).double()
    torch.nn.init.normal_(layer.qkv_bias)
    torch.nn.init.normal_(layer.out_proj.bias)
    x = torch.randn(2, 12, 6, 2, 5, dtype=torch.float64)
    rows = x.permute(0, 3, 4, 2, 1)  # (B, H, W, T, C)
    if dense:
        qkv = (rows @ layer.qkv_weight.T + layer.qkv_bias).unflatten(-1, (3, 3, 4))
        q, k, v = qkv.permute(4, 0, 1, 2, 5, 3, 6).unbind()
    else:
        per_head = torch.einsum("...hi,hoi->...ho", rows.unflatten(-1, (3, 4)), layer.qkv_weight)
        q, k, v = (per_head + layer.qkv_bias).transpose(-2, -3).split(4, -1)
    o = local_temporal_attention(q, k, v, kernel_size=3, dilation=2, causal=True)
    expected = layer.out_proj(o.transpose(-2, -3).flatten(-2)).permute(0, 4, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_initialisation() -> None:
    for dense in (False, True):
        layer = LocalTemporalAttention(256, 4, dense_qkv=dense, out_proj=True)
        fan_in = 256 if dense else 64
        std = math.sqrt(2 / (fan_in + 3 * 256))
        assert layer.qkv_weight.std().item() == pytest.approx(std, rel=0.02)
        assert not layer.qkv_bias.any()
        assert not layer.out_proj.bias.any()
    # The same draws as Xavier's on the weight of all heads in two dimensions.
    torch.manual_seed(3)
    layer = LocalTemporalAttention(16, 4)
    torch.manual_seed(3)
    expected = torch.nn.init.xavier_normal_(torch.empty(48, 4))
    assert torch.equal(layer.qkv_weight.flatten(0, 1), expected)


@backend_parameter
def test_any_layout_gives_the_same_result_in_channels_last(backend: str) -> None:
    layer = LocalTemporalAttention(8, 2, backend=backend)
    x = torch.randn(2, 8, 4, 3, 5)
    expected = layer(x)
    assert expected.is_contiguous(memory_format=torch.channels_last_3d)
    for same in (
        x.to(memory_format=torch.channels_last_3d),
        torch.cat([x, x])[:2],
        x.transpose(-1, -2).contiguous().transpose(-1, -2),
    ):
        output = layer(same)
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(output, expected)


def copies(layer: LocalTemporalAttention, x: Tensor, grad: Tensor) -> list[tuple[str, int]]:
    """Copying operations of a forward and backward pass with their number of elements."""
    layer(x).backward(grad)
    layer.zero_grad(set_to_none=False)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        layer(x).backward(grad)
    return [
        (event.name, math.prod(event.input_shapes[0]))
        for event in trace.events()
        if event.name == "aten::copy_"  # clone(), contiguous() and to() end there, too
        # float16 is projected in float32, on casts that live no longer than that, and a matrix
        # product of many rows starts from copies of the bias.
        and not (
            x.dtype == torch.float16
            and event.cpu_parent.name in ("aten::_to_copy", "aten::addmm", "_Linear")
        )
    ]


@pytest.mark.parametrize("backend", [p for p in backends_here() if p.values[0] == "cpu"])
@pytest.mark.parametrize("preset", [None, "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 4, 6, 6), (1, 8, 3, 5), (2, 1, 7, 7), (2, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("workers", [1, 2])
def test_no_activation_is_copied(
    workers: int, size: tuple, dtype: torch.dtype, preset: str | None, backend: str
) -> None:
    layer = LocalTemporalAttention(32, 4, preset=preset, dtype=dtype, backend=backend)
    batch, *rest = size
    x, grad = (torch.randn(batch, *rest, 32, dtype=dtype).movedim(-1, 1) for _ in range(2))
    with threads(workers):
        found = copies(layer, x.requires_grad_(), grad)
    # torch's convolution hands the gradient of its weight over with a copy, and its matrix product
    # of a head starts from a copy of the bias (a row, or a matrix of one row).
    weight, bias = layer.qkv_weight, layer.qkv_bias
    parameters = {weight.numel(), weight[0].numel(), bias[0].numel()}
    assert [copy for copy in found if copy[1] not in parameters] == []


def test_the_copy_counter_counts() -> None:
    layer = LocalTemporalAttention(32, 4, backend="reference")
    x = torch.randn(2, 32, 4, 6, 6, requires_grad=True)
    assert ("aten::copy_", x.numel()) in copies(layer, x, torch.randn_like(x))


@backend_parameter
def test_state_dict_moves_between_backends(backend: str) -> None:
    options = {"kernel_size": 3, "out_proj": True}
    source = LocalTemporalAttention(8, 2, **options, backend="reference")
    target = LocalTemporalAttention(8, 2, **options, backend=backend)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert set(source.state_dict()) == {
        "qkv_weight", "qkv_bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip
    x = torch.randn(2, 8, 4, 3, 3)
    torch.testing.assert_close(source(x), target(x))


@backend_parameter
def test_pickle_and_deepcopy(backend: str) -> None:
    layer = LocalTemporalAttention(8, 2, preset="published", backend=backend)
    x = torch.randn(2, 8, 4, 3, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.qkv_weight.data_ptr() != layer.qkv_weight.data_ptr()


def test_dropout_in_training_only() -> None:
    layer = LocalTemporalAttention(32, 4, dropout=0.5)
    x = torch.randn(2, 32, 4, 6, 6)
    dropped = (layer(x) == 0).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.03)
    layer.eval()
    assert (layer(x) == 0).sum() == 0


@backend_parameter
def test_autocast(backend: str) -> None:
    layer = LocalTemporalAttention(16, 4, out_proj=True, backend=backend)
    x = torch.randn(2, 16, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.02)
    output.sum().backward()
    assert x.grad.dtype == layer.qkv_weight.grad.dtype == torch.float32


def test_float16_training_agrees_with_float32() -> None:
    layer = LocalTemporalAttention(16, 4).half()
    x = torch.randn(2, 16, 4, 3, 3).half()
    with torch.no_grad():
        inference = layer(x)
    training = layer(x)
    torch.testing.assert_close(training, inference, rtol=2e-3, atol=2e-3)
    training.float().square().mean().backward()
    wide = copy.deepcopy(layer).float()
    wide.zero_grad()
    wide(x.float()).square().mean().backward()
    scale = wide.qkv_weight.grad.abs().max()
    assert (layer.qkv_weight.grad - wide.qkv_weight.grad).abs().max() < 5e-3 * scale


@backend_parameter
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("frames", [None, 1, 6])
def test_fold_contains_what_comes_before(
    frames: int | None, dense: bool, bias: bool, backend: str
) -> None:
    layer = LocalTemporalAttention(
        24, 3, 3, bias=bias, dense_qkv=dense, edge="zero", backend=backend, dtype=torch.float64
    )
    if layer.qkv_bias is not None:
        nn.init.normal_(layer.qkv_bias)
    norm = nn.BatchNorm3d(24, dtype=torch.float64).eval()
    for x in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(x)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    clip = torch.randn(2, 24, frames or 6, 3, 2, dtype=torch.float64)
    position = None if frames is None else torch.randn(24, frames, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = layer.fold(scale, norm.bias - norm.running_mean * scale, position)
    expected = layer(norm(clip if position is None else clip + position[:, :, None, None]))
    torch.testing.assert_close(folded(clip), expected, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_fold_refuses_bad_input() -> None:
    layer, one = LocalTemporalAttention(8, 2), torch.ones(8)
    with pytest.raises(TypeError, match="shift must be a tensor, got float"):
        layer.fold(one, 0.0)
    with pytest.raises(ValueError, match=r"scale must have shape \(8,\), got \(4,\)"):
        layer.fold(one[:4], one)
    with pytest.raises(ValueError, match=r"position must have shape \(8, T\), got \(4, 8\)"):
        layer.fold(one, one, torch.ones(4, 8))
    folded = layer.fold(one, one, torch.ones(8, 4))
    with pytest.raises(ValueError, match="x must have the 4 frames of the position table"):
        folded(torch.zeros(1, 8, 5, 2, 2))
    with pytest.raises(ValueError, match="has a position table already"):
        folded.fold(one, one)


def test_repr_names_what_is_not_default() -> None:
    assert repr(LocalTemporalAttention(8, 2)).startswith(
        "LocalTemporalAttention(\n  8, heads=2, kernel_size=5"
    )
    text = repr(LocalTemporalAttention(8, 2, dilation=2, causal=True, bias=False, scale=0.5))
    assert "8, heads=2, kernel_size=5, dilation=2, causal=True, scale=0.5, bias=False" in text
    assert "preset='published'" in repr(LocalTemporalAttention(8, 2, preset="published"))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"heads": 3}, ValueError, "channels=8 must be divisible by heads=3"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"channels": -8}, ValueError, "channels must be at least 1, got -8"),
        ({"channels": 8.0}, TypeError, "channels must be an integer, got 8.0"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": 0, "preset": "published"}, ValueError, "kernel_size must be at least 1"),
        ({"preset": "paper"}, ValueError, "preset must be 'published' or None, got 'paper'"),
        ({"preset": "published", "edge": "shift"}, ValueError, "preset='published' sets edge"),
        ({"preset": "published", "scale": 1.0}, ValueError, "preset='published' sets edge"),
        ({"preset": "published", "dilation": 2}, ValueError, "key_table needs"),
        ({"bias": "no"}, TypeError, "bias must be a bool, got 'no'"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point one or None"),
        ({"dropout": 1.5}, ValueError, "dropout must be in 0 to 1, got 1.5"),
        ({"dropout": math.nan}, ValueError, "dropout must be in 0 to 1, got nan"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"key_table": published_key_table(4, 5), "edge": "zero"}, ValueError, "heads=2"),
    ],
)
def test_bad_arguments(arguments: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        LocalTemporalAttention(**{"channels": 8, "heads": 2, **arguments})


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (2, 4, 4, 3, 3), (2, 8, 4, 3, 3, 1)], ids=str)
def test_bad_input(shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"x must be \(B, 8, T, H, W\), got \("):
        LocalTemporalAttention(8, 2)(torch.randn(shape))


def test_bad_dtype_device_and_size() -> None:
    with pytest.raises(TypeError, match=r"x must have the layer's dtype .* got torch.int64"):
        LocalTemporalAttention(8, 2)(torch.zeros(2, 8, 4, 3, 3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"x must have the layer's dtype .* got torch.float64"):
        LocalTemporalAttention(8, 2)(torch.zeros(2, 8, 4, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must be on the layer's device cpu, got meta"):
        LocalTemporalAttention(8, 2)(torch.zeros(2, 8, 4, 3, 3, device="meta"))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        LocalTemporalAttention(8, 2)([1.0])
    with pytest.raises(ValueError, match="x must not be empty in C, T, H and W"):
        LocalTemporalAttention(8, 2)(torch.randn(2, 8, 0, 3, 3))
    assert LocalTemporalAttention(8, 2)(torch.randn(0, 8, 4, 3, 3)).shape == (0, 8, 4, 3, 3)
