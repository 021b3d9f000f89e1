"""Compiled CUDA kernels. Addresses are raw device pointers, strides count elements."""

from array import array
from typing import Any

_Operand = tuple[int, int, int, int, int]
_Sizes = tuple[int, int, int, int, int]
_Window = tuple[int, int, int, int]
_Hyper = tuple[float, float, float, float, float, float]

class UnsupportedError(NotImplementedError): ...

def version() -> str: ...
def architectures() -> str: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...
def local_attention_forward(
    dtype: str,
    sizes: _Sizes,
    window: _Window,
    scale: float,
    key_table: list[int],
    q: _Operand,
    k: _Operand,
    v: _Operand,
    o: _Operand,
    device: int,
    stream: int,
) -> None: ...
def local_attention_backward(
    dtype: str,
    sizes: _Sizes,
    window: _Window,
    scale: float,
    key_table: list[int],
    q: _Operand,
    k: _Operand,
    v: _Operand,
    do: _Operand,
    dq: _Operand,
    dk: _Operand,
    dv: _Operand,
    device: int,
    stream: int,
) -> None: ...

# A launch is a dict of entry, grid, block, shared (dynamic, in bytes) and parameters; a parameter
# is a struct with its bytes and its fields (name, offset, type, meaning). Four operands (q, k, v,
# o) ask for the forward pass, seven (q, k, v, do, dq, dk, dv) for the backward pass.
def local_attention_launches(
    dtype: str,
    sizes: _Sizes,
    window: _Window,
    scale: float,
    key_table: list[int],
    operands: list[_Operand],
) -> list[dict[str, Any]]: ...

PREPARAM_CHUNK: int

# `addresses` are those of numbers (lr, momentum, 1 - dampening, weight_decay, scale, gradient_scale
# in float64), found_inf (float32) and the largest magnitudes (two numbers for each
# PREPARAM_CHUNK elements of a tensor, in the dtype that is computed in), 0 for none.
def preparam_sgd_step(
    table: array[int],
    param: str,
    pre_param: str,
    hyper: _Hyper,
    nesterov: bool,
    rounding: str,
    random: tuple[int, int],
    addresses: tuple[int, int, int],
    device: int,
    stream: int,
) -> None: ...
def preparam_sgd_step_overflows(
    table: array[int],
    param: str,
    pre_param: str,
    hyper: _Hyper,
    nesterov: bool,
    rounding: str,
    random: tuple[int, int],
    addresses: tuple[int, int, int],
    device: int,
    stream: int,
) -> None: ...
def preparam_launches(
    table: array[int],
    param: str,
    pre_param: str,
    hyper: _Hyper,
    nesterov: bool,
    rounding: str,
    random: tuple[int, int],
    addresses: tuple[int, int, int],
    overflows: bool,
) -> list[dict[str, Any]]: ...
