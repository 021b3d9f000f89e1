"""Problem sizes that the kernels are compiled, inspected and dumped for, and their launches.

Needs triton, but no GPU: operands are meta tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ca3d_kernels import triton_launch
from ca3d_kernels.local_attention import triton as attention
from ca3d_kernels.local_attention.functional import published_key_table
from ca3d_kernels.local_attention.layout import empty_dense
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.preparam_step import triton as step
from ca3d_kernels.preparam_step.op import ROUNDINGS, Batch
from ca3d_kernels.preparam_step.reference import Hyperparameters
from ca3d_kernels.preparam_step.remembered import unknown_largest
from ca3d_kernels.qkv_attention import triton as qkv
from ca3d_kernels.temporal_block import triton as block
from ca3d_kernels.temporal_block.op import Weights
from ca3d_kernels.triton_launch import Launch

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class Case(NamedTuple):
    """A named problem of an op.

    Attributes:
        op: name of the op.
        name: of the problem.
        values: of its keys; see `DEFAULTS`.
    """

    op: str
    name: str
    values: dict[str, Any]


_VIDEO: dict[str, Any] = {
    "batch": 20,
    "positions": 196,
    "heads": 4,
    "frames": 8,
    "head_dim": 64,
    "kernel_size": 5,
    "dilation": 1,
    "causal": False,
    "edge": "truncate",
    "published": False,
    "dtype": "float16",
}
# What a problem of an op is made of, with the values of CA3D's first attention stage and of its
# 7.1 million parameters in 137 tensors, 103 of them small.
DEFAULTS: dict[str, dict[str, Any]] = {
    "local_attention": _VIDEO,
    "qkv_attention": {**_VIDEO, "bias": "head"},
    # Its kernel takes no key table.
    "temporal_block": {
        **{key: value for key, value in _VIDEO.items() if key != "published"},
        "residual_blocks": 2,
    },
    "preparam_step": {
        "small_tensors": 103,
        "small_size": 256,
        "large_tensors": 34,
        "large_size": 208_000,
        "momentum": 0.9,
        "nesterov": False,
        "dtype": "float16",
        "pre_param_dtype": "float16",
        "rounding": "nearest",
    },
}

_STAGE_2 = {"positions": 49, "heads": 8, "frames": 4}
_ORDINARY: dict[str, dict[str, dict[str, Any]]] = {
    "local_attention": {
        "stage 1": {},
        "stage 2": _STAGE_2,
        "stage 1, published": {"edge": "zero", "published": True},
        "16 frames": {"frames": 16},
        "64 frames": {"frames": 64},
        "128 frames": {"frames": 128},
        "stage 1, bfloat16": {"dtype": "bfloat16"},
        "stage 1, float32": {"dtype": "float32"},
        "head_dim 128": {"head_dim": 128},
        "head_dim 128, float32": {"head_dim": 128, "dtype": "float32"},
    },
    "qkv_attention": {
        "stage 1": {},
        "stage 2": _STAGE_2,
        "stage 1, published": {"edge": "zero", "published": True},
        "stage 2, published": {**_STAGE_2, "edge": "zero", "published": True},
        "stage 1, one table": {"bias": "frame"},
        "stage 1, published, one table": {"edge": "zero", "published": True, "bias": "frame"},
        "16 frames": {"frames": 16},
        "64 frames": {"frames": 64},
        "stage 1, bfloat16": {"dtype": "bfloat16"},
        "stage 1, published, bfloat16": {"edge": "zero", "published": True, "dtype": "bfloat16"},
    },
    "temporal_block": {
        "stage 1": {},
        "stage 2": _STAGE_2,
        "stage 2, large model": {**_STAGE_2, "residual_blocks": 8},
        "16 frames": {"frames": 16},
        "stage 1, bfloat16": {"dtype": "bfloat16"},
    },
    "preparam_step": {
        "small model": {},
        "small model, bfloat16": {"dtype": "bfloat16", "pre_param_dtype": "bfloat16"},
        "small model, float32 masters": {"pre_param_dtype": "float32"},
        "small model, stochastic": {"rounding": "stochastic"},
        "small model, compensated": {"rounding": "compensated"},
    },
}


def cases(changes: Mapping[str, str] | None = None) -> list[Case]:
    """The ordinary problems of every op, or one problem of every op that has the given keys.

    Args:
        changes: key -> value as text; keys that are left out have the values of `DEFAULTS`.

    Raises:
        ValueError: no op has such a key, or the value isn't one for it.

    Example:
        >>> [case.values["frames"] for case in cases({"frames": "16", "heads": "2"})]
        [16, 16, 16]
    """
    if changes is None:
        return [
            Case(op, name, {**DEFAULTS[op], **values})
            for op, problems in _ORDINARY.items()
            for name, values in problems.items()
        ]
    known = sorted({key for values in DEFAULTS.values() for key in values})
    for key in changes:
        if key not in known:
            raise ValueError(f"--problem: no op has the key {key!r}; keys: {', '.join(known)}")
    name = ",".join(f"{key}={value}" for key, value in changes.items())
    result = []
    for op, default in DEFAULTS.items():
        if set(changes) <= set(default):
            parsed = {key: _parsed(key, text, default[key]) for key, text in changes.items()}
            result.append(Case(op, name, {**default, **parsed}))
    if not result:
        raise ValueError(f"--problem: no op has all of the keys {', '.join(changes)}")
    return result


def _parsed(key: str, text: str, default: Any) -> Any:
    allowed = {
        "edge": ("truncate", "zero", "shift"),
        "bias": ("none", "head", "frame"),
        "dtype": tuple(DTYPES),
        "pre_param_dtype": tuple(DTYPES),
        "rounding": ROUNDINGS,
    }
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--problem: {key} must be true or false, got {text!r}")
        return text.lower() == "true"
    if isinstance(default, str):
        if text not in allowed[key]:
            raise ValueError(f"--problem: {key} must be one of {allowed[key]}, got {text!r}")
        return text
    try:
        value = type(default)(text)
    except ValueError:
        value = -1
    if value < (0 if isinstance(default, float) else 1):
        kind = "a number of at least 0" if isinstance(default, float) else "an integer above 0"
        raise ValueError(f"--problem: {key} must be {kind}, got {text!r}")
    return value


def launches(case: Case, arch: str, device: str = "meta") -> list[Launch]:
    """The launches of a problem's forward and backward pass, or of its step.

    Args:
        case: the problem.
        arch: such as ``"sm_90"``; decides between the variants of a kernel.
        device: of the operands, which are not initialised.

    Raises:
        UnsupportedInputError: naming the limit of a kernel.

    Example:
        >>> [len(launches(case, "sm_90")) for case in cases()][:2]
        [2, 2]
    """
    with triton_launch.planned_for(arch):
        return _MAKERS[case.op](case.values, torch.device(device))


def options(values: Mapping[str, Any]) -> Options:
    """The options of an attention problem.

    Example:
        >>> options(DEFAULTS["local_attention"]).kernel_size
        5
    """
    table: tuple[int, ...] = ()
    if values.get("published"):
        rows = published_key_table(values["heads"], values["kernel_size"])
        table = tuple(x for row in rows for pair in row for x in pair)
    return Options(
        kernel_size=values["kernel_size"],
        dilation=values["dilation"],
        causal=values["causal"],
        scale=None,
        edge=values["edge"],
        key_table=table,
    )


def attention_operands(values: Mapping[str, Any], device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v as slices of a channels-last projection, the output, and the gradient of the slices.

    Example:
        >>> operands = attention_operands(DEFAULTS["local_attention"], torch.device("meta"))
        >>> operands[0].shape, operands[0].stride(-2)
        (torch.Size([20, 196, 4, 8, 64]), 150528)
    """
    sizes = [values[key] for key in ("batch", "frames", "positions", "heads", "head_dim")]
    shape = (*sizes[:4], 3, sizes[4])
    projected = torch.empty(shape, dtype=DTYPES[values["dtype"]], device=device)
    packed = projected.permute(0, 2, 3, 4, 1, 5)  # (B, N, heads, 3, T, head_dim)
    q, k, v = packed.unbind(-3)
    return q, k, v, empty_dense(q), torch.empty_like(packed)


def _attention(values: Mapping[str, Any], device: torch.device) -> list[Launch]:
    q, k, v, o, gradient = attention_operands(values, device)
    dq, dk, dv = gradient.unbind(-3)
    window = options(values)
    return [
        attention.forward_launch(q, k, v, o, window),
        attention.backward_launch(empty_dense(q), q, k, v, dq, dk, dv, window),
    ]


def _qkv(values: Mapping[str, Any], device: torch.device) -> list[Launch]:
    heads, head_dim = values["heads"], values["head_dim"]
    shape = (values["batch"], values["frames"], values["positions"], heads * head_dim)
    like: dict[str, Any] = {"dtype": DTYPES[values["dtype"]], "device": device}
    x, o = (torch.empty(shape, **like) for _ in range(2))
    weight = torch.empty(heads, 3 * head_dim, head_dim, **like)
    per_frame = (values["frames"],) if values["bias"] == "frame" else ()
    bias = torch.empty(heads, *per_frame, 3 * head_dim, **like)
    shift = None if values["bias"] == "none" else bias
    window = options(values)
    launches = [qkv.forward_launch(x, weight, shift, o, window)]
    if values["bias"] != "frame":  # which is for inference
        dx = torch.empty_like(x)
        launches += qkv.backward_launches(o, x, weight, shift, dx, window).launches
    return launches


def block_operands(
    values: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, Weights, Tensor]:
    """Clip, weights and output of a folded temporal half.

    Example:
        >>> block_operands(DEFAULTS["temporal_block"], torch.device("meta"))[0].shape
        torch.Size([20, 8, 196, 256])
    """
    heads, head_dim, frames = (values[key] for key in ("heads", "head_dim", "frames"))
    like: dict[str, Any] = {"dtype": DTYPES[values["dtype"]], "device": device}
    shape = (values["batch"], frames, values["positions"], heads * head_dim)
    shapes = Weights.shapes(heads, head_dim, frames, 2 * values["residual_blocks"])
    weights = Weights(*(torch.empty(shape, **like) for shape in shapes.values()))
    return torch.empty(shape, **like), weights, torch.empty(shape, **like)


def _block(values: Mapping[str, Any], device: torch.device) -> list[Launch]:
    return [block.launch(*block_operands(values, device), options(values))]


def step_batch(values: Mapping[str, Any], device: torch.device) -> Batch:
    """The tensors of a step.

    Example:
        >>> len(step_batch(DEFAULTS["preparam_step"], torch.device("meta")).params)
        137
    """
    sizes = [values["small_size"]] * values["small_tensors"]
    sizes += [values["large_size"]] * values["large_tensors"]

    def tensors(dtype: str) -> list[Tensor]:
        return [torch.empty(size, dtype=DTYPES[dtype], device=device) for size in sizes]

    wide = values["pre_param_dtype"]
    hyper = Hyperparameters(0.01, values["momentum"], 0.0, 1e-4, values["nesterov"])
    momenta = tensors(wide) if values["momentum"] else []
    params, grads = tensors(values["dtype"]), tensors(values["dtype"])
    rounding = values["rounding"]
    batch = Batch(params, grads, tensors(wide), momenta, hyper, 128.0, 128.0, rounding, cache={})
    if batch.applied == "compensated":
        batch = batch._replace(compensations=tensors(wide))
    return batch


def _step(values: Mapping[str, Any], device: torch.device) -> list[Launch]:
    batch = step_batch(values, device)
    found_inf = torch.empty((), dtype=torch.float32, device=device)
    largest = unknown_largest(batch, step.CHUNK)
    return [
        *step.launches(batch, found_inf, overflows=True),
        *step.launches(batch, found_inf, overflows=True, largest=largest),
        *step.launches(batch, found_inf, largest=largest),
        *step.launches(batch, None),
    ]


_MAKERS: dict[str, Callable[[Mapping[str, Any], torch.device], list[Launch]]] = {
    "local_attention": _attention,
    "qkv_attention": _qkv,
    "temporal_block": _block,
    "preparam_step": _step,
}
