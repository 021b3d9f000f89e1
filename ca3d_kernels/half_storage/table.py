"""Which of torch's functions are evaluated in float32, and how; and the two ways to ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ca3d_kernels.half_storage import convolution, products
from ca3d_kernels.half_storage.norms import batch_norm, instance_norm
from ca3d_kernels.half_storage.recomputed import applies, recomputed

_MATMUL = ("matmul", "mm", "bmm")
_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: products.linear,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.conv1d: convolution.rule(1, transposed=False),
    F.conv2d: convolution.rule(2, transposed=False),
    F.conv3d: convolution.rule(3, transposed=False),
    F.conv_transpose1d: convolution.rule(1, transposed=True),
    F.conv_transpose2d: convolution.rule(2, transposed=True),
    F.conv_transpose3d: convolution.rule(3, transposed=True),
    Tensor.__matmul__: products.matmul,
    **{getattr(space, name): products.matmul for space in (torch, Tensor) for name in _MATMUL},
}
_PRODUCTS = ("addbmm", "addmm", "baddbmm", "inner")
# What torch 2.14 lacks in float16 on a CPU, or takes several times as long for as in float32 (AMD
# EPYC, one thread, 2026-11-27, beside other work): convolutions, matrix products and recurrent
# layers 10 to 90 times, `grid_sample` of volumes 100, distances 40, attention 3 to 10, adaptive
# pools to more than one voxel 3 to 8. Normalisations are no slower, but
# keep their statistics in float16. Softmax, activations, maximum pools, means, sums and copies are
# torch's own: they compute in float32 inside and take 0.5 to 1.5 times as long.
_APPLIED = {
    *_RULES,
    *(getattr(space, name) for space in (torch, Tensor) for name in _PRODUCTS),
    F.adaptive_avg_pool3d,
    F.avg_pool3d,
    F.bilinear,
    F.grid_sample,
    F.group_norm,
    F.layer_norm,
    F.local_response_norm,
    F.lp_pool3d,
    F.multi_head_attention_forward,
    F.rms_norm,
    F.scaled_dot_product_attention,
    Tensor.__rmatmul__,
    torch.bilinear,
    torch.cdist,
    torch.chain_matmul,
    torch.einsum,
    torch.gru,
    torch.gru_cell,
    torch.layer_norm,
    torch.group_norm,
    torch.linalg.multi_dot,
    torch.lstm,
    torch.lstm_cell,
    torch.rms_norm,
    torch.rnn_relu,
    torch.rnn_relu_cell,
    torch.rnn_tanh,
    torch.rnn_tanh_cell,
    torch.tensordot,
}


def half_storage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of float16 CPU tensors compute in float32 and store in float16.

    The backward pass evaluates the function again on float32 copies of its inputs, so that nothing
    but the inputs is kept. Convolutions, linear maps and matrix products do without: their
    gradients don't need it.

    Args:
        function: any differentiable function of tensors and other arguments, such as those of
            `torch.nn.functional`, that has no side effect and the same result at every call. Where
            an argument is a float16 CPU tensor, it gets all of them in float32; otherwise the
            arguments as they are.

    Returns:
        A function of the same arguments. Its float32 results are rounded to float16.

    Example:
        >>> x = torch.ones(1, 1, 4, dtype=torch.float16, requires_grad=True)
        >>> half_storage(F.avg_pool1d)(x, 2).dtype
        torch.float16
    """
    rule = _RULES.get(function)

    def stored_in_half(*args: Any, **kwargs: Any) -> Any:
        if not applies((args, kwargs)):
            return function(*args, **kwargs)
        if rule is not None:
            return rule(function, *args, **kwargs)
        return recomputed(function, *args, **kwargs)

    return stored_in_half


class HalfStorage(TorchFunctionMode):
    """Applies `half_storage` to all functions of torch that are slow or missing in float16.

    These are convolutions, linear maps, matrix products, normalisations, attention, recurrent
    layers, average pools of volumes and interpolation by areas. Activations, softmax, maximum
    pools, sums and copies are torch's own: they compute in float32 inside and keep no more than
    they must. So are calls that ask for a dtype or say where the result goes (`out`). Tensors of
    other dtypes and devices are not affected.

    Example:
        >>> layer = torch.nn.Conv3d(3, 4, 3).half()
        >>> with HalfStorage():
        ...     y = layer(torch.ones(1, 3, 4, 8, 8, dtype=torch.float16))
        >>> y.dtype
        torch.float16
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Calls a function of torch."""
        kwargs = kwargs or {}
        if _wanted(func, args, kwargs):
            return half_storage(func)(*args, **kwargs)
        return func(*args, **kwargs)


def _wanted(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if func is F.adaptive_avg_pool3d:  # to one voxel it is a mean
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return size not in (1, (1, 1, 1), [1, 1, 1])
    if func is F.interpolate:
        return kwargs.get("mode") == "area" or bool(kwargs.get("antialias"))
    if func not in _APPLIED or kwargs.get("out") is not None:
        return False
    return not any(isinstance(x, torch.dtype) for x in _pytree.tree_leaves((args, kwargs)))
