"""The pre-parameter SGD step in plain torch: any mapping, any dtype, any device."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ca3d_kernels.preparam_step.mapping import PreParamMapping
from ca3d_kernels.preparam_step.philox import Draws
from ca3d_kernels.preparam_step.stochastic import round_stochastically

HALVES = (torch.float16, torch.bfloat16)
_ROUNDINGS = ("nearest", "stochastic", "compensated", "published")
# Rounds away from zero: see `round_stochastically`.
_LARGEST_DRAW = 0xFFFFFFFF


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
    compensation: Tensor | None = None

    def is_finite(self) -> bool:
        """Whether every value is finite.

        Example:
            >>> Stepped(torch.ones(1), torch.tensor([torch.inf]), None).is_finite()
            False
        """
        return all(bool(x.isfinite().all()) for x in self if x is not None)


def applied(rounding: str, dtype: torch.dtype) -> str:
    """The rounding that pre-parameters of a dtype really get.

    "stochastic" and "compensated" make up for what float16 and bfloat16 lose against the float32
    that a step is computed in. Where nothing is lost they are "nearest".

    Example:
        >>> applied("stochastic", torch.float16), applied("stochastic", torch.float32)
        ('stochastic', 'nearest')
    """
    if rounding in ("stochastic", "compensated") and dtype not in HALVES:
        return "nearest"
    return rounding


def stepped(
    param: Tensor,
    grad: Tensor,
    pre_param: Tensor,
    momentum: Tensor | None,
    mapping: PreParamMapping,
    hyper: Hyperparameters,
    rounding: str = "nearest",
    compensation: Tensor | None = None,
    draws: Draws | None = None,
) -> Stepped:
    """One SGD step of a pre-parameter, without changing any argument.

    With theta the pre-parameter, m its momentum and G the mapped gradient (equation 2):

        d = G + weight_decay theta;  m' = momentum m + (1 - dampening) d, or d in the first step;
        theta' = theta - lr (d + momentum m' with Nesterov momentum, else m');  w' = w(theta').

    "nearest", "stochastic" and "compensated" compute this in float32 (float64 for float64 tensors),
    every operation rounded by itself. They differ in what is stored in float16 and bfloat16; wider
    tensors are rounded to nearest by all three. w' is always computed from theta' as it is stored,
    and rounded to nearest. Bytes are those that a step reads and writes for each parameter of 16
    bits, with momentum:

    - "nearest" (12 bytes) rounds theta' and m' to nearest, ties to even.
    - "stochastic" (12 bytes) rounds theta' and m' by `round_stochastically`: with 16 random bits
      each (see `Draws`). So theta and m are, in the mean, those of a step without rounding.
    - "compensated" (16 bytes) keeps r, what theta lacks, in the dtype of theta, and steps
      theta + r (Kahan's summation); theta + r takes the place of theta in d:

          e = r - lr (...);  theta' = theta + e;  r' = e - (theta' - theta);

      theta', r' and m' are rounded to nearest; theta' in r' is the stored one.

    "published" rounds every operation to the dtype of theta: the mapped gradient is given to
    torch's own SGD.

    Args:
        param: w, any shape, floating point.
        grad: gradient of w, same shape and dtype.
        pre_param: theta, same shape, the dtype of w or a wider one.
        momentum: m, like theta; None before the first step or without momentum.
        mapping: the map between w and theta.
        hyper: the numbers of the step.
        rounding: "nearest", "stochastic", "compensated" or "published".
        compensation: r, like theta; None is 0. For "compensated" only.
        draws: the random numbers, for "stochastic" only. None stands for the largest number
            everywhere: theta and m are then rounded away from zero, so that what is stored bounds
            what any draw stores.

    Returns:
        The new w, theta, m (None without momentum) and r (None unless "compensated") in the dtypes
        of w, theta, theta and theta.

    Raises:
        ValueError: unknown rounding.

    Example:
        >>> from ca3d_kernels.preparam_step.mapping import LinearMapping
        >>> w, g = torch.tensor([0.5]), torch.tensor([1.0])
        >>> stepped(w, g, 128 * w, None, LinearMapping(128.0), Hyperparameters(lr=0.25)).param
        tensor([0.2500])
    """
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding must be one of {_ROUNDINGS}, got {rounding!r}")
    if rounding == "published":
        return _stepped_published(param, grad, pre_param, momentum, mapping, hyper)
    dtype = pre_param.dtype
    rounding = applied(rounding, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theta = pre_param.to(wide)
    total, rest = theta, torch.zeros_like(theta)
    if rounding == "compensated":
        if compensation is not None:
            rest = compensation.to(wide)
        total = theta + rest
    mapped = mapping.map_grad(grad.to(wide), param.to(wide))
    d = mapped + total * hyper.weight_decay
    update, m = d, None
    if hyper.momentum != 0 or momentum is not None:
        m = d
        if momentum is not None:
            m = momentum.to(wide) * hyper.momentum + d * (1 - hyper.dampening)
        update = d + m * hyper.momentum if hyper.nesterov else m
    new_compensation = None
    if rounding == "compensated":
        change = rest - update * hyper.lr
        new_pre_param = (theta + change).to(dtype)
        new_compensation = (change - (new_pre_param.to(wide) - theta)).to(dtype)
        new_momentum = None if m is None else m.to(dtype)
    elif rounding == "stochastic":
        words = torch.full(theta.shape, _LARGEST_DRAW, device=theta.device)
        if draws is not None:
            words = draws.words(pre_param)
        new_pre_param = round_stochastically(theta - update * hyper.lr, dtype, words & 0xFFFF)
        new_momentum = None if m is None else round_stochastically(m, dtype, words >> 16)
    else:
        new_pre_param = (theta - update * hyper.lr).to(dtype)
        new_momentum = None if m is None else m.to(dtype)
    new_param = mapping.to_param(new_pre_param.to(wide)).to(param.dtype)
    return Stepped(new_param, new_pre_param, new_momentum, new_compensation)


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
