"""The pre-parameter SGD step in plain torch: any mapping, any dtype, any device."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ca3d_kernels.preparam_step.mapping import PreParamMapping


class Hyperparameters(NamedTuple):
    """The numbers of one SGD step.

    Example:
        >>> Hyperparameters(lr=0.1, momentum=0.9).dampening
        0.0
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


class Stepped(NamedTuple):
    """What a step stores for one tensor.

    Example:
        >>> Stepped(torch.ones(1), torch.ones(1), None).is_finite()
        True
    """

    param: Tensor
    pre_param: Tensor
    momentum: Tensor | None

    def is_finite(self) -> bool:
        """Whether every value is finite.

        Example:
            >>> Stepped(torch.ones(1), torch.tensor([torch.inf]), None).is_finite()
            False
        """
        return all(bool(x.isfinite().all()) for x in self if x is not None)


def stepped(
    param: Tensor,
    grad: Tensor,
    pre_param: Tensor,
    momentum: Tensor | None,
    mapping: PreParamMapping,
    hyper: Hyperparameters,
    rounding: str = "nearest",
) -> Stepped:
    """One SGD step of a pre-parameter, without changing any argument.

    With theta the pre-parameter, m its momentum and G the mapped gradient (equation 2):

        d = G + weight_decay theta;  m' = momentum m + (1 - dampening) d, or d in the first step;
        theta' = theta - lr (d + momentum m' with Nesterov momentum, else m');  w' = w(theta').

    Args:
        param: w, any shape, floating point.
        grad: gradient of w, same shape and dtype.
        pre_param: theta, same shape, the dtype of w or a wider one.
        momentum: m, like theta; None before the first step or without momentum.
        mapping: the map between w and theta.
        hyper: the numbers of the step.
        rounding: "nearest" computes in float32 (float64 for float64 tensors) and rounds each value
            once, when it is stored; w' is computed from theta' as it is stored. "published" rounds
            every operation to the dtype of theta: the mapped gradient is given to torch's own SGD.

    Returns:
        The new w, theta and m (None without momentum) in the dtypes of w, theta and theta.

    Raises:
        ValueError: unknown rounding.

    Example:
        >>> from ca3d_kernels.preparam_step.mapping import LinearMapping
        >>> w, g = torch.tensor([0.5]), torch.tensor([1.0])
        >>> stepped(w, g, 128 * w, None, LinearMapping(128.0), Hyperparameters(lr=0.25)).param
        tensor([0.2500])
    """
    if rounding == "published":
        return _stepped_published(param, grad, pre_param, momentum, mapping, hyper)
    if rounding != "nearest":
        raise ValueError(f"unknown rounding {rounding!r}; allowed: nearest, published")
    wide = torch.float64 if pre_param.dtype == torch.float64 else torch.float32
    theta = pre_param.to(wide)
    mapped = mapping.map_grad(grad.to(wide), param.to(wide))
    d = mapped + theta * hyper.weight_decay
    update, new_momentum = d, None
    if hyper.momentum != 0:
        m = d
        if momentum is not None:
            m = momentum.to(wide) * hyper.momentum + d * (1 - hyper.dampening)
        update = d + m * hyper.momentum if hyper.nesterov else m
        new_momentum = m.to(pre_param.dtype)
    new_pre_param = (theta - update * hyper.lr).to(pre_param.dtype)
    new_param = mapping.to_param(new_pre_param.to(wide)).to(param.dtype)
    return Stepped(new_param, new_pre_param, new_momentum)


def _stepped_published(
    param: Tensor,
    grad: Tensor,
    pre_param: Tensor,
    momentum: Tensor | None,
    mapping: PreParamMapping,
    hyper: Hyperparameters,
) -> Stepped:
    dtype = pre_param.dtype
    new_pre_param = pre_param.clone()
    momenta = [None if momentum is None else momentum.clone()]
    sgd(
        [new_pre_param],
        [mapping.map_grad(grad.to(dtype), param.to(dtype))],
        momenta,
        foreach=False,
        weight_decay=hyper.weight_decay,
        momentum=hyper.momentum,
        lr=hyper.lr,
        dampening=hyper.dampening,
        nesterov=hyper.nesterov,
        maximize=False,
    )
    return Stepped(mapping.to_param(new_pre_param).to(param.dtype), new_pre_param, momenta[0])


def derived(param: Tensor, mapping: PreParamMapping, dtype: torch.dtype, rounding: str) -> Tensor:
    """Pre-parameter of a weight as it is stored.

    Args:
        param: w, any shape, floating point.
        mapping: the map.
        dtype: of the pre-parameter.
        rounding: "published" maps in `dtype`, rounding every operation; any other value maps in
            float32 (float64 for a float64 pre-parameter) and rounds once.

    Returns:
        theta, in the layout of w.

    Example:
        >>> from ca3d_kernels.preparam_step.mapping import LinearMapping
        >>> derived(torch.ones(1), LinearMapping(128.0), torch.float16, "nearest")
        tensor([128.], dtype=torch.float16)
    """
    return mapping.to_pre_param(param.to(_mapped_in(dtype, rounding))).to(dtype)


def restored(
    pre_param: Tensor, mapping: PreParamMapping, dtype: torch.dtype, rounding: str
) -> Tensor:
    """Weight that a step stores for a pre-parameter, the counterpart of `derived`.

    Args:
        pre_param: theta, any shape, floating point.
        mapping: the map.
        dtype: of the weight.
        rounding: as in `derived`.

    Returns:
        w, in the layout of theta.

    Example:
        >>> from ca3d_kernels.preparam_step.mapping import LinearMapping
        >>> restored(torch.full((1,), 64.0), LinearMapping(128.0), torch.float16, "nearest")
        tensor([0.5000], dtype=torch.float16)
    """
    return mapping.to_param(pre_param.to(_mapped_in(pre_param.dtype, rounding))).to(dtype)


def _mapped_in(dtype: torch.dtype, rounding: str) -> torch.dtype:
    if rounding == "published" or dtype == torch.float64:
        return dtype
    return torch.float32
