"""Compiled CPU kernels. Addresses are raw pointers, strides count elements."""

from array import array

import numpy as np
from numpy.typing import NDArray

_Operand = tuple[int, int, int, int, int]

def version() -> str: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def openmp() -> str: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def local_attention_forward(
    dtype: str,
    sizes: tuple[int, int, int, int, int],
    window: tuple[int, int, int, int],
    scale: float,
    key_table: list[int],
    q: _Operand,
    k: _Operand,
    v: _Operand,
    o: _Operand,
    threads: int,
) -> None: ...
def local_attention_backward(
    dtype: str,
    sizes: tuple[int, int, int, int, int],
    window: tuple[int, int, int, int],
    scale: float,
    key_table: list[int],
    q: _Operand,
    k: _Operand,
    v: _Operand,
    do: _Operand,
    dq: _Operand,
    dk: _Operand,
    dv: _Operand,
    threads: int,
) -> None: ...

preparam_run: int

def preparam_sgd_step(
    table: array[int],
    param: str,
    pre_param: str,
    hyper: tuple[float, float, float, float, float, float],
    nesterov: bool,
    rounding: str,
    random: tuple[int, int],
    threads: int,
    largest: NDArray[np.float64] | None = None,
) -> None: ...
def preparam_sgd_step_overflows(
    table: array[int],
    param: str,
    pre_param: str,
    hyper: tuple[float, float, float, float, float, float],
    nesterov: bool,
    rounding: str,
    random: tuple[int, int],
    threads: int,
    largest: NDArray[np.float64] | None = None,
) -> bool: ...
def normalise(
    dtype: str,
    matrix: tuple[int, int],
    relu: bool,
    affine: tuple[int, int],
    eps: float,
    y: int,
    residual: int,
    statistics: tuple[int, int],
    z: int,
    threads: int,
) -> None: ...
def normalise_again(
    dtype: str,
    matrix: tuple[int, int],
    relu: bool,
    affine: tuple[int, int],
    eps: float,
    y: int,
    statistics: tuple[int, int],
    z: int,
    threads: int,
) -> None: ...
def normalise_backward(
    dtype: str,
    matrix: tuple[int, int],
    relu: bool,
    affine: tuple[int, int],
    eps: float,
    y: int,
    statistics: tuple[int, int],
    dz: int,
    more: int,
    dy: int,
    gradients: tuple[int, int],
    threads: int,
) -> None: ...

# dtype, sizes, window, scale and key_table as above; number of convolutions.
_TemporalBlock = tuple[
    str, tuple[int, int, int, int, int], tuple[int, int, int, int], float, list[int], int
]

def temporal_block_filter_count(problem: _TemporalBlock) -> int: ...
def temporal_block_filters(
    problem: _TemporalBlock, column_weight: int, filters: int, threads: int
) -> None: ...
def temporal_block(
    problem: _TemporalBlock,
    weights: tuple[int, int, int, int, int, int, int, int],
    x: tuple[int, int, int, int],
    out: tuple[int, int, int, int],
    threads: int,
) -> None: ...
def folded_conv_panel(outputs: int) -> int: ...
def folded_conv(
    dtype: str,
    sizes: tuple[int, int, int, int, int, int],
    filters: int,
    affine: tuple[int, int, int, int],
    x: int,
    residual: int,
    z: int,
    threads: int,
) -> None: ...
def folded_epilogue(
    dtype: str,
    matrix: tuple[int, int],
    affine: tuple[int, int, int, int],
    y: int,
    residual: int,
    z: int,
    threads: int,
) -> None: ...
