"""Saving and restoring PreParamSGD: dtypes stay, and a resumed run goes on bit for bit."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from step_cases import assert_same_bits, parameters, set_gradients
from torch import nn

from ca3d_kernels import LinearMapping, PreParamSGD, published_mapping

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "float16": {"momentum": 0.9},
    "float32 theta": {"momentum": 0.9, "pre_param_dtype": torch.float32},
    "stochastic": {"momentum": 0.9, "rounding": "stochastic", "seed": 11},
    "compensated": {"momentum": 0.9, "rounding": "compensated"},
    "stochastic, no kernel": {
        "momentum": 0.9,
        "rounding": "stochastic",
        "mapping": published_mapping("f16-root"),
    },
    "no momentum": {"mapping": LinearMapping(64.0), "skip_nonfinite": True},
    "published": {
        "momentum": 0.9,
        "dampening": 0.1,
        "rounding": "published",
        "mapping": published_mapping("f16-root"),
    },
}


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def advance(params: list[nn.Parameter], optimizer: PreParamSGD, begin: int, end: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(begin, end):
            set_gradients(params, seed=step)
            optimizer.step()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    options = {"lr": 0.05, "weight_decay": 1e-3, **CONFIGURATIONS[name]}
    params = parameters(torch.float16)
    optimizer = PreParamSGD(params, **options)
    advance(params, optimizer, 0, 3)
    checkpoint = saved_and_loaded(
        {"params": [w.detach() for w in params], "optimizer": optimizer.state_dict()}
    )
    advance(params, optimizer, 3, 6)

    resumed = [nn.Parameter(w) for w in checkpoint["params"]]
    other = PreParamSGD(resumed, **{**options, "lr": 0.5, "seed": 5})
    other.load_state_dict(checkpoint["optimizer"])
    assert other.param_groups[0]["lr"] == 0.05
    assert other.param_groups[0]["mapping"] is options.get("mapping", other.defaults["mapping"])
    advance(resumed, other, 3, 6)
    for a, b in zip(params, resumed, strict=True):
        assert_same_bits(b, a)
        assert optimizer.state[a].keys() == other.state[b].keys()
        for key, value in optimizer.state[a].items():
            assert_same_bits(other.state[b][key], value, key)


def test_state_keeps_its_dtype_and_is_a_copy() -> None:
    params = parameters(torch.float16, [5])
    optimizer = PreParamSGD(params, lr=0.1, momentum=0.9, pre_param_dtype=torch.float32)
    advance(params, optimizer, 0, 1)
    saved = optimizer.state_dict()
    # A value that float16 can't hold: casting on the way would lose it.
    saved["state"][0]["pre_parameter"][0] = 1.0001
    clone = PreParamSGD(params, lr=0.1, momentum=0.9, pre_param_dtype=torch.float32)
    clone.load_state_dict(saved)
    state = clone.state[params[0]]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert state["pre_parameter"][0].item() == pytest.approx(1.0001, abs=1e-6)
    state["momentum_buffer"].zero_()
    assert not (saved["state"][0]["momentum_buffer"] == 0).all()


def test_skipped_steps_are_saved() -> None:
    (w,) = parameters(torch.float16, [5])
    optimizer = PreParamSGD([w], lr=0.1, skip_nonfinite=True)
    w.grad = torch.full_like(w, torch.inf)
    optimizer.step()
    optimizer.step()
    other = PreParamSGD([w], lr=0.1)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.skipped_steps == 2


def test_weights_that_do_not_belong_to_the_state_are_noticed() -> None:
    params = parameters(torch.float16, [5, 6])
    optimizer = PreParamSGD(params, lr=0.1)
    advance(params, optimizer, 0, 1)
    others = parameters(torch.float16, [5, 6], seed=1)
    other = PreParamSGD(others, lr=0.0)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.0
    before = [w.detach().clone() for w in others]
    set_gradients(others)
    with pytest.warns(RuntimeWarning, match="2 parameters were changed outside"):
        other.step()
    for a, b in zip(others, before, strict=True):
        assert_same_bits(a, b)


def test_hooks_of_the_user_see_and_change_the_state() -> None:
    params = parameters(torch.float16, [5])
    optimizer = PreParamSGD(params, lr=0.1, momentum=0.9, pre_param_dtype=torch.float32)
    advance(params, optimizer, 0, 1)
    seen = []

    def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {k: v / 2 for k, v in s.items()} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(
        lambda self: seen.append(self.state[params[0]]["momentum_buffer"].dtype)
    )
    momentum = optimizer.state[params[0]]["momentum_buffer"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], momentum / 2)
    assert seen == [torch.float32]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_alike(way: str, rounding: str) -> None:
    model = nn.Linear(6, 4).half()
    optimizer = PreParamSGD(
        model.parameters(),
        lr=0.1,
        momentum=0.9,
        rounding=rounding,
        seed=3,
        skip_nonfinite=True,
        backend="reference",
    )
    advance(list(model.parameters()), optimizer, 0, 2)
    pair = {"model": model, "optimizer": optimizer}
    copied = pickle.loads(pickle.dumps(pair)) if way == "pickle" else copy.deepcopy(pair)
    for one in (pair, copied):
        advance(list(one["model"].parameters()), one["optimizer"], 2, 4)
    assert copied["optimizer"].skip_nonfinite
    assert copied["optimizer"].backend == "reference"
    for a, b in zip(model.parameters(), copied["model"].parameters(), strict=True):
        assert a is not b
        assert_same_bits(b, a)


def test_foreign_states_are_refused_and_nothing_is_loaded() -> None:
    params = parameters(torch.float16, [5])
    optimizer = PreParamSGD(params, lr=0.1, momentum=0.9)
    advance(params, optimizer, 0, 1)
    before = copy.deepcopy(optimizer.state_dict())

    plain = torch.optim.SGD(params, lr=0.5, momentum=0.9)
    with pytest.raises(ValueError, match="not one of PreParamSGD: group 0 has no mapping"):
        optimizer.load_state_dict(plain.state_dict())
    other = PreParamSGD(params, lr=0.5, mapping=LinearMapping(100.0))
    with pytest.raises(ValueError, match=r"LinearMapping\(scale=100.0.*this optimizer has.*128.0"):
        optimizer.load_state_dict(other.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][0]["momentum_buffer"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 has shape \(6,\)"):
        optimizer.load_state_dict(wrong)
    two = PreParamSGD([{"params": [w]} for w in parameters(torch.float16, [5, 5])], lr=0.5)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two.state_dict())

    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert_same_bits(after["state"][0][key], value)
