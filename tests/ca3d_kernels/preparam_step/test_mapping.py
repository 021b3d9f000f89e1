"""Maps between weights and pre-parameters, and the published arithmetic bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from step_cases import assert_same_bits
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamMapping, PreParamSGD, published_mapping
from ca3d_kernels.preparam_step.mapping import PublishedMapping

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "ref_quantizer.npz")

# name -> map, dtype of the weights, dtype of the pre-parameters, whether the published run has any
CONFIGURATIONS = {
    "f16": (published_mapping("f16"), torch.float16, torch.float16, True),
    "f16-sqr": (published_mapping("f16-sqr"), torch.float16, torch.float16, True),
    "f16-root": (published_mapping("f16-root"), torch.float16, torch.float16, True),
    "f16-qat": (PublishedMapping(), torch.float16, torch.float32, True),
    "f16-raw": (PublishedMapping(), torch.float16, torch.float16, False),
    "f32": (PublishedMapping(), torch.float32, torch.float32, False),
}
CASES = [(prefix, name) for prefix in ("", "edge/") for name in CONFIGURATIONS]


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


@pytest.mark.parametrize(("prefix", "name"), CASES)
def test_maps_equal_the_published_ones(prefix: str, name: str) -> None:
    mapping, dtype, wide, _ = CONFIGURATIONS[name]
    w = golden(f"{prefix}w").to(dtype)
    grad = golden("edge/g" if prefix else "g1").to(dtype)
    theta = mapping.to_pre_param(w.to(wide))
    assert_same_bits(theta, golden(f"{prefix}{name}/theta0"))
    assert_same_bits(mapping.to_param(theta).to(dtype), golden(f"{prefix}{name}/w_roundtrip"))
    assert_same_bits(mapping.map_grad(grad.to(wide), w.to(wide)), golden(f"{prefix}{name}/gmap1"))


@pytest.mark.parametrize(("prefix", "name"), CASES)
def test_steps_equal_the_published_ones(prefix: str, name: str) -> None:
    mapping, dtype, wide, has_theta = CONFIGURATIONS[name]
    if not has_theta:
        # Then the published code steps w itself, which keeps the sign of a zero as this map does.
        mapping = LinearMapping(1.0)
    w = nn.Parameter(golden(f"{prefix}w").to(dtype))
    optimizer = PreParamSGD(
        [w],
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-3,
        mapping=mapping,
        rounding="published",
        pre_param_dtype=wide,
    )
    for step in (1,) if prefix else (1, 2):
        w.grad = golden("edge/g" if prefix else f"g{step}").to(dtype)
        optimizer.step()
        state = optimizer.state[w]
        key = f"{prefix}{name}"
        assert_same_bits(state["momentum_buffer"], golden(f"{key}/buf{step}"), "momentum")
        assert_same_bits(w, golden(f"{key}/w{step}"), "w")
        if has_theta:
            assert_same_bits(state["pre_parameter"], golden(f"{key}/theta{step}"), "theta")


def test_overflow_cases_do_overflow() -> None:
    # The edge vectors would be worth little if nothing overflowed in them.
    for name in ("f16", "f16-sqr"):
        assert golden(f"edge/{name}/theta0").isinf().any()
    assert golden("edge/f16/gmap1").isinf().any()


@pytest.mark.parametrize("name", ["f16", "f16-sqr", "f16-root"])
def test_published_maps_invert_each_other(name: str) -> None:
    mapping = published_mapping(name)
    w = torch.linspace(-2, 2, 401, dtype=torch.float64)
    torch.testing.assert_close(mapping.to_param(mapping.to_pre_param(w)), w, atol=1e-12, rtol=0)


def test_closed_forms() -> None:
    w = torch.linspace(-2, 2, 401, dtype=torch.float64)
    w = w[w != 0]
    grad = torch.linspace(-1, 1, len(w), dtype=torch.float64)
    square, root = published_mapping("f16-sqr"), published_mapping("f16-root")
    expected = w.sign() * (w**2 + w.abs())
    torch.testing.assert_close(square.to_pre_param(w), expected, atol=1e-12, rtol=0)
    expected = 10 * grad / (2 * w.abs() + 1)
    torch.testing.assert_close(square.map_grad(grad, w), expected, atol=1e-9, rtol=0)
    expected = w.sign() * (10 * (w.abs() + 0.25).sqrt() - 5)
    torch.testing.assert_close(root.to_pre_param(w), expected, atol=1e-12, rtol=0)
    published = published_mapping("f16")
    torch.testing.assert_close(published.to_pre_param(w), 100 * w)
    torch.testing.assert_close(published.map_grad(grad, w), 1000 * grad)


def test_chain_rule_map_is_the_derivative() -> None:
    # The one published map whose gradient is a gradient: dL/dtheta of 10 (the inverse loss factor)
    # times the loss, away from 0.
    mapping = published_mapping("f16-sqr")
    theta = torch.tensor([-3.0, -0.1, 0.2, 5.0], dtype=torch.float64, requires_grad=True)
    w = mapping.to_param(theta)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    (expected,) = torch.autograd.grad((w * weights).sum(), theta)
    actual = mapping.map_grad(0.1 * weights, w.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_linear_map() -> None:
    w = torch.tensor([0.5, -0.25, 0.0, -0.0])
    mapping = LinearMapping(100.0, loss_factor=0.1)
    assert torch.equal(mapping.to_pre_param(w), w * 100)
    assert torch.equal(mapping.to_param(w), w / 100)
    assert torch.equal(mapping.map_grad(w, w), w * (100 / 0.1))
    assert mapping.linear_scales == (100.0, 100 / 0.1)
    assert LinearMapping().scale == 128.0
    assert published_mapping("f16").linear_scales == (100.0, 100 / 0.1)
    assert published_mapping("f16-sqr").linear_scales is None


def test_power_of_two_scale_is_exact() -> None:
    every = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    small = every[(every.abs() < 511) & (every.abs() >= 2**-14)]
    mapping = LinearMapping(128.0)
    assert_same_bits(mapping.to_param(mapping.to_pre_param(small)), small)


def test_subclass_must_define_the_map() -> None:
    class Half(PreParamMapping):
        pass

    w = torch.ones(1)
    for call in (
        lambda: Half().to_param(w),
        lambda: Half().to_pre_param(w),
        lambda: Half().map_grad(w, w),
    ):
        with pytest.raises(NotImplementedError, match="Half does not define"):
            call()
    assert repr(Half()) == "Half()"
    assert Half().linear_scales is None


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_constants_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match=f"scale must be positive and finite, got {value!r}"):
        LinearMapping(value)
    with pytest.raises(ValueError, match="loss_factor must be positive"):
        LinearMapping(1.0, loss_factor=value)
    with pytest.raises(ValueError, match="power must be positive"):
        PublishedMapping(power=value)


@pytest.mark.parametrize("value", ["128", None, True, torch.tensor(1.0)])
def test_constants_must_be_numbers(value: object) -> None:
    with pytest.raises(TypeError, match="scale must be a number"):
        LinearMapping(value)  # type: ignore[arg-type]


def test_offset_and_name_are_checked() -> None:
    with pytest.raises(ValueError, match=r"offset must be finite and not positive, got 0.5"):
        PublishedMapping(offset=0.5)
    with pytest.raises(ValueError, match=r"'f8'; allowed: f16, f16-sqr, f16-root"):
        published_mapping("f8")
