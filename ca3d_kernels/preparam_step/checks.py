"""Checks of what a user gives to `PreParamSGD`."""

import math
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels.preparam_step.mapping import PreParamMapping
from ca3d_kernels.preparam_step.plan import TENSOR_NUMBERS

ROUNDINGS = ("nearest", "stochastic", "compensated", "published")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_options(group: dict[str, Any]) -> None:
    """Raises a TypeError or ValueError for an option of a group that is not allowed."""
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor):
            if name not in TENSOR_NUMBERS or value.numel() != 1:
                raise ValueError(f"{name} must be a number{_or_tensor(name)}, got {value!r}")
            if value.device.type != "cpu":
                continue  # its value is for the kernels to read: asking for it would wait
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number{_or_tensor(name)}, got {value!r}")
        number = float(value)
        if not math.isfinite(number) or (number < 0 and name != "dampening"):
            allowed = "finite" if name == "dampening" else "finite and at least 0"
            raise ValueError(f"{name} must be {allowed}, got {number}")
    if not isinstance(group["nesterov"], bool):
        raise TypeError(f"nesterov must be True or False, got {group['nesterov']!r}")
    momentum = group["momentum"]
    # The value of a tensor may change; on a GPU asking for it would wait.
    positive = isinstance(momentum, Tensor) or momentum > 0
    if group["nesterov"] and (not positive or group["dampening"] != 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening 0, "
            f"got momentum {momentum} and dampening {group['dampening']}"
        )
    if not isinstance(group["mapping"], PreParamMapping):
        raise TypeError(
            "mapping must be a PreParamMapping such as LinearMapping(128.0), "
            f"got {group['mapping']!r}"
        )
    if group["rounding"] not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {group['rounding']!r}")
    dtype = group["pre_param_dtype"]
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"pre_param_dtype must be None or one of {DTYPES}, got {dtype!r}")


def _or_tensor(name: str) -> str:
    return " or a tensor with one element" if name in TENSOR_NUMBERS else ""


def check_param(i: int, param: Tensor, pre_param_dtype: torch.dtype | None) -> None:
    """Raises a TypeError or ValueError for parameter `i` of a group if its dtype is not allowed."""
    if param.dtype not in DTYPES:
        raise TypeError(f"parameter {i} must be of one of the dtypes {DTYPES}, got {param.dtype}")
    wide = pre_param_dtype or param.dtype
    if torch.promote_types(param.dtype, wide) != wide:
        raise ValueError(
            f"pre_param_dtype {wide} can't hold parameter {i}, which is of dtype {param.dtype}"
        )


def scalar(value: object) -> Tensor | None:
    """found_inf or grad_scale; raises a TypeError or ValueError unless None or of one element."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"found_inf and grad_scale must be tensors, got {value!r}")
    if value.numel() != 1:
        raise ValueError(f"found_inf and grad_scale must have one element, got {value.numel()}")
    return value
