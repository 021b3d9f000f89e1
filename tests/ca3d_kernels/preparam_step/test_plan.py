"""What PreParamSGD keeps from step to step never outlives a change of what it steps."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from step_cases import assert_same_bits, parameters, set_gradients
from torch import nn

from ca3d_kernels import LinearMapping, PreParamSGD, published_mapping

Change = Callable[[list[nn.Parameter], PreParamSGD], None]


def drop_a_gradient(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    params[1].grad = None


def other_layout_of_a_gradient(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    params[2].grad = params[2].grad.t().contiguous().t()


def replace_momentum(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    for i in (0, 3):
        optimizer.state[params[i]]["momentum_buffer"] = torch.ones_like(params[i])


def replace_theta(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    state = optimizer.state[params[0]]
    state["pre_parameter"] = state["pre_parameter"] * 2


def forget_everything(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.state.clear()


def add_a_group(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    params.append(nn.Parameter(torch.ones(5, dtype=params[0].dtype)))
    set_gradients(params, seed=9)
    optimizer.add_param_group({"params": [params[-1]], "weight_decay": 0.1})


def drop_a_parameter(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.param_groups[0]["params"].pop(1)


def other_options(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.param_groups[0].update(lr=0.3, weight_decay=0.0, dampening=0.2)


def no_momentum(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.param_groups[0]["momentum"] = 0.0


def published_rounding(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.param_groups[0]["rounding"] = "published"


def stochastic_rounding(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.param_groups[0]["rounding"] = "stochastic"


def compensated_rounding(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.param_groups[0]["rounding"] = "compensated"


def replace_compensation(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    state = optimizer.state[params[0]]
    if "compensation" in state:
        state["compensation"] = state["compensation"] + 0.01


def other_seed(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.seed = 9


def reload_state(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def replace_storage(params: list[nn.Parameter], optimizer: PreParamSGD) -> None:
    params[0].data = params[0].detach().clone()


CHANGES = [
    drop_a_gradient,
    other_layout_of_a_gradient,
    replace_momentum,
    replace_theta,
    forget_everything,
    add_a_group,
    drop_a_parameter,
    other_options,
    no_momentum,
    published_rounding,
    stochastic_rounding,
    compensated_rounding,
    replace_compensation,
    other_seed,
    reload_state,
    replace_storage,
]


@pytest.mark.filterwarnings("ignore:1 parameters were changed outside")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_change_acts_as_on_a_fresh_optimizer(
    change: Change, skip_nonfinite: bool, rounding: str
) -> None:
    """The optimizer that kept its plans takes the same step as one whose plans were thrown away."""
    results = []
    for forget in (False, True):
        params = parameters(torch.float16, [5, 17, (4, 6), 700])
        params += parameters(torch.float32, [9])
        optimizer = PreParamSGD(
            params,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.01,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
        )
        for step in range(2):
            set_gradients(params, seed=step)
            optimizer.step()
        set_gradients(params, seed=7)
        change(params, optimizer)
        if forget:
            optimizer._plans.clear()
        optimizer.step()
        set_gradients(params, seed=8)
        optimizer.step()
        states = [value for w in params for value in optimizer.state[w].values()]
        results.append([*params, *states])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


def test_another_map_derives_the_pre_parameters_again() -> None:
    (w,) = parameters(torch.float16, [20])
    optimizer = PreParamSGD([w], lr=0.0)
    set_gradients([w])
    optimizer.step()
    before = w.detach().clone()
    for mapping in (LinearMapping(32.0), published_mapping("f16-root")):
        optimizer.param_groups[0]["mapping"] = mapping
        with pytest.warns(RuntimeWarning, match="1 parameters were changed outside"):
            optimizer.step()
    torch.testing.assert_close(w, before, atol=3e-3, rtol=0)  # f16-root is that coarse near zero
    theta = optimizer.state[w]["pre_parameter"]
    expected = published_mapping("f16-root").to_pre_param(before.float()).half()
    assert_same_bits(theta, expected)


@pytest.mark.parametrize("mapping", [LinearMapping(), published_mapping("f16-root")])
@pytest.mark.parametrize("value", [1.0, torch.inf])
def test_gradients_are_not_kept_alive(mapping: LinearMapping, value: float) -> None:
    (w,) = parameters(torch.float16, [20])
    optimizer = PreParamSGD([w], lr=0.1, mapping=mapping, skip_nonfinite=True)
    for _ in range(2):
        w.grad = torch.full_like(w, value)
        alive = weakref.ref(w.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert alive() is None


def test_steps_of_tensors_that_moved_write_to_the_new_place() -> None:
    # A stale address would be written to memory that is free by then.
    (w,) = parameters(torch.float16, [1000])
    optimizer = PreParamSGD([w], lr=0.1, momentum=0.9)
    set_gradients([w])
    optimizer.step()
    state = optimizer.state[w]
    old = {name: value.clone() for name, value in state.items()}
    for value in state.values():
        value.data = value.clone()
    kept = [value.data_ptr() for value in state.values()]
    optimizer.step()
    assert [value.data_ptr() for value in state.values()] == kept
    assert all((state[name] != value).any() for name, value in old.items())
