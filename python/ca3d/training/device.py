"""Choosing the device to compute on."""

from __future__ import annotations

import os

import torch

from ca3d.errors import UserError


def choose_device(name: str) -> torch.device:
    """Returns the device of a name such as "auto", "cpu" or "cuda:1".

    Of several processes on a machine each takes its own GPU, unless one is named.

    Raises:
        ca3d.errors.UserError: The name is no device, or the device is not there.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    own = os.environ.get("LOCAL_RANK")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and own is not None:
        name = f"cuda:{own}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device; use auto, cpu or cuda") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine has {count} CUDA devices")
    elif device.type != "cpu":
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    return device
