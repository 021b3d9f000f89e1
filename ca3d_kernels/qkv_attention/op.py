"""Registers ``ca3d::qkv_attention`` and ``ca3d::qkv_attention_backward`` with torch.

The fused kernels provide first derivatives; double backward differentiates the definition in
`reference`. There is no rule for forward mode and vmap: the layer that uses this op takes the
separate ones where these are active.
"""

import functools
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ca3d_kernels import backends, triton_launch
from ca3d_kernels.grad_mode import unrecorded
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.qkv_attention import reference
from ca3d_kernels.qkv_attention.tiling import limit


class Kernels(Protocol):
    """What a backend provides for this op. x, o and their gradients have contiguous channels."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, o: Tensor, options: Options
    ) -> None:
        """Writes the output (B, T, N, C) into o."""

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dx: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        """Writes the gradient of x into dx, returns those of weight and bias."""


class ReferenceKernels:
    """torch's projection, then the kernels of local attention."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, o: Tensor, options: Options
    ) -> None:
        """Writes the output into o."""
        qkv = reference.project(x, weight, bias)
        out = torch.ops.ca3d.local_attention_packed(qkv, *options)
        o.copy_(out.permute(0, 3, 1, 2, 4).flatten(-2))

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dx: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        """Writes the gradient of x into dx, returns those of weight and bias."""
        heads, _, head_dim = weight.shape
        qkv = reference.project(x, weight, bias)
        split = grad.unflatten(-1, (heads, head_dim)).permute(0, 2, 3, 1, 4)
        dqkv = torch.ops.ca3d.local_attention_packed_backward(split, qkv, *options)
        dy = dqkv.permute(0, 4, 1, 2, 3, 5).flatten(-2)  # (B, T, N, heads, 3 * head_dim)
        dx.copy_(torch.einsum("btnho,hoi->btnhi", dy, weight).flatten(-2))
        pixels = x.unflatten(-1, (heads, head_dim))
        dweight = torch.einsum("btnho,btnhi->hoi", dy, pixels)
        if bias is not None and bias.dim() == 3:
            return dweight, dy.sum((0, 2)).transpose(0, 1)
        return dweight, dy.sum((0, 1, 2))


@functools.cache
def _load_triton() -> Kernels:
    from ca3d_kernels.qkv_attention.triton import TritonKernels

    return TritonKernels()


backends.register(
    "qkv_attention", backends.Implementation("reference", ReferenceKernels, lambda device: None)
)
backends.register(
    "qkv_attention",
    backends.Implementation("triton", _load_triton, triton_launch.unavailable),
)


def _bias_shape(weight: Tensor, bias: Tensor | None) -> torch.Size:
    """Shape of the bias' gradient, which is there even if no bias is."""
    return weight.shape[:-1] if bias is None else bias.shape


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    window = Options(*options)
    o = x.new_empty(x.shape)
    x, weight = _last_contiguous(x), weight.contiguous()
    shift = None if bias is None else bias.contiguous()
    if o.numel():
        backends.run(
            "qkv_attention",
            x.device.type,
            window.backend,
            lambda kernels: kernels.forward(x, weight, shift, o, window),
        )
    return o


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    window = Options(*options)
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx, torch.zeros_like(weight), weight.new_zeros(_bias_shape(weight, bias))
    grad, x, weight = _last_contiguous(grad), _last_contiguous(x), weight.contiguous()
    shift = None if bias is None else bias.contiguous()
    dweight, dbias = backends.run(
        "qkv_attention",
        x.device.type,
        window.backend,
        lambda kernels: kernels.backward(grad, x, weight, shift, dx, window),
    )
    return dx, dweight.to(x.dtype), dbias.to(x.dtype).contiguous()


_TAIL = (
    "int kernel_size, int dilation, bool causal, float? scale, str edge, int[] key_table, "
    "str backend"
)
_library = torch.library.Library("ca3d", "FRAGMENT")
for _name, _schema, _kernel in (
    (
        "qkv_attention",
        f"(Tensor x, Tensor weight, Tensor? bias, {_TAIL}) -> Tensor",
        _forward,
    ),
    (
        "qkv_attention_backward",
        f"(Tensor grad, Tensor x, Tensor weight, Tensor? bias, {_TAIL}) "
        "-> (Tensor, Tensor, Tensor)",
        _backward,
    ),
):
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, unrecorded(_kernel), _device)
torch.library.register_fake(
    "ca3d::qkv_attention", lambda x, *rest: x.new_empty(x.shape), lib=_library
)
torch.library.register_fake(
    "ca3d::qkv_attention_backward",
    lambda grad, x, weight, bias, *rest: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(_bias_shape(weight, bias)),
    ),
    lib=_library,
)


def _define(tensors: tuple[Tensor | None, ...], options: Options) -> Tensor:
    x, weight, bias = tensors
    assert x is not None
    assert weight is not None
    return reference.qkv_attention(x, weight, bias, **options.definition())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = Options(*inputs[3:])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.ca3d.qkv_attention_backward(grad, x, weight, bias, *ctx.options)
    return dx, dweight, None if bias is None else dbias, *(None for _ in Options._fields)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = Options(*inputs[4:])


def _second_gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """Differentiates the gradients of the definition."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        grad, *operands = leaves
        inputs = [t for t in operands if t is not None]
        output = _define(tuple(operands), ctx.options)
        firsts = torch.autograd.grad(output, inputs, grad, create_graph=True)
        wanted = [t for t in leaves if t is not None]
        weights = [
            torch.zeros_like(first) if c is None else c
            for first, c in zip(firsts, cotangents, strict=False)
        ]
        seconds = iter(
            torch.autograd.grad(firsts, wanted, weights, allow_unused=True, create_graph=True)
        )
    return *(None if t is None else next(seconds) for t in leaves), *(None for _ in Options._fields)


torch.library.register_autograd(
    "ca3d::qkv_attention", _gradients, setup_context=_setup, lib=_library
)
torch.library.register_autograd(
    "ca3d::qkv_attention_backward", _second_gradients, setup_context=_setup_backward, lib=_library
)


def is_fused(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> bool:
    """Whether fused kernels take an input, in the backward pass too where there will be one.

    The separate ops serve every other input.

    Args:
        x, weight, bias: the operands of `qkv_attention`.
        options: of the attention.

    Example:
        >>> is_fused(torch.empty(1, 8, 9, 32), torch.empty(2, 48, 16), None, Options())
        False
    """
    if x.device.type != "cuda" and not triton_launch.interpreted():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    # Who wants the CUDA kernels or the definition gets them for the attention.
    backend = options.backend or backends.from_environment()
    if options.backend == "cpu" or backend in ("cuda", "reference"):
        return False
    if limit(x, weight, bias, options, backward=False):
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    if differentiated and limit(x, weight, bias, options, backward=True):
        return False
    if x.device.type == "cpu":
        return backend == "triton"
    chosen = backends.choose("qkv_attention", "cuda", options.backend)[0].backend
    return chosen == "triton" and triton_launch.has_tensor_cores(x.device)


def qkv_attention(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """Local temporal attention of pixels that are projected head by head.

    Args:
        x: (B, T, N, C), channels contiguous (others are copied).
        weight: (heads, 3 * head_dim, head_dim), of x's dtype; rows of q, k and v.
        bias: (heads, 3 * head_dim), one for every frame, (heads, T, 3 * head_dim), or None. The
            second is for inference: it has no backward kernel.
        options: of `ca3d_kernels.local_temporal_attention`, checked.

    Returns:
        (B, T, N, C), contiguous.

    Raises:
        ValueError: the demanded backend can't run here.

    Example:
        >>> x = torch.randn(1, 8, 9, 32)
        >>> qkv_attention(x, torch.randn(2, 48, 16), None, Options()).shape
        torch.Size([1, 8, 9, 32])
    """
    return torch.ops.ca3d.qkv_attention(x, weight, bias, *options)
