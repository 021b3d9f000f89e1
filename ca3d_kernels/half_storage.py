"""float16 on a CPU: stored in half, computed in float32.

Few CPUs compute in half precision, and torch's float16 convolutions and matrix products are many
times slower than its float32 ones there. Here such functions run in float32 on copies that live no
longer than the call: the graph keeps half tensors, and results are rounded to half once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

__all__ = ["HalfStorage", "half_storage"]


def half_storage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of float16 CPU tensors compute in float32 and store in float16.

    The backward pass evaluates the function again on float32 copies of its inputs, so that nothing
    but the inputs is kept. Convolutions and linear maps do without: their gradients don't need it.

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
        return _recomputed(function, *args, **kwargs)

    return stored_in_half


class HalfStorage(TorchFunctionMode):
    """Applies `half_storage` to all functions of torch that are slow or missing in float16.

    These are convolutions, linear maps, matrix products, normalisations, softmax, average pools and
    attention. Activations, maximum pools, sums and copies are torch's own: they compute in float32
    inside and keep no more than they must. Tensors of other dtypes and devices are not affected.

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
        if func in _APPLIED:
            return half_storage(func)(*args, **kwargs)
        return func(*args, **kwargs)


def applies(arguments: Any) -> bool:
    """Whether there is a float16 CPU tensor among arguments.

    Example:
        >>> applies((torch.ones(2), 1)), applies(((), {"x": torch.ones(2).half()}))
        (False, True)
    """
    return any(_is_half(x) for x in _pytree.tree_leaves(arguments))


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float16 and x.device.type == "cpu"


def _wide(x: Any) -> Any:
    return x.float() if _is_half(x) else x


def _half(x: Any) -> Any:
    return x.half() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def _plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The definition, in operations that every transform of torch knows."""
    args, kwargs = _pytree.tree_map(_wide, (args, kwargs))
    return _pytree.tree_map(_half, function(*args, **kwargs))


def _must_be_plain() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


# ---- any function ----


class _Recomputed(torch.autograd.Function):
    """Keeps the tensors among the arguments, and evaluates the function again for the gradient."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        before = torch.get_rng_state()
        outputs = call(*map(_wide, tensors))
        ctx.random = None if torch.equal(before, torch.get_rng_state()) else before
        return _pytree.tree_map(_half, outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        # With create_graph the copies must stay connected to what they were made of.
        again = torch.is_grad_enabled()
        with torch.enable_grad(), torch.random.fork_rng(devices=[], enabled=ctx.random is not None):
            if ctx.random is not None:
                torch.set_rng_state(ctx.random)
            if again:
                inputs = [tensors[i] for i in wanted]
                copies = [_wide(x) for x in tensors]
            else:
                copies = [_wide(x).detach() for x in tensors]
                inputs = [copies[i].requires_grad_() for i in wanted]
            outputs = _pytree.tree_leaves(ctx.call(*copies))
            pairs = [
                (y, _wide(g))
                for y, g in zip(outputs, grads, strict=True)
                if g is not None and y.requires_grad
            ]
            found = torch.autograd.grad(
                [y for y, _ in pairs], inputs, [g for _, g in pairs],
                create_graph=again, allow_unused=True,
            )  # fmt: skip
        results: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(wanted, found, strict=True):
            results[i] = None if gradient is None else gradient.to(tensors[i].dtype)
        return None, *results


def _recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _must_be_plain():
        return _plain(function, *args, **kwargs)
    leaves, structure = _pytree.tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        args, kwargs = _pytree.tree_unflatten(filled, structure)
        return function(*args, **kwargs)

    tensors = [leaves[i] for i in places]
    for i in places:
        leaves[i] = None  # the closure must not keep them a second time
    return _Recomputed.apply(call, *tensors)


# ---- convolutions and linear maps ----


# float32 copies of a convolution's input and output together, of as many items of the batch as fit.
# Parts of 8 MB are large enough for the convolution and small beside what a model keeps.
_CHUNK_BYTES = 8 << 20


def _chunks(x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Iterator[slice]:
    """Slices of the batch, by the size of an output without padding and dilation."""
    transposed, groups, steps = options[3], options[5], math.prod(options[0])
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    pixels = x[0, 0].numel()
    made = channels * (pixels * steps if transposed else pixels // steps)
    items = max(_CHUNK_BYTES // (4 * (x.shape[1] * pixels + made)), 1)
    return (slice(i, i + items) for i in range(0, len(x), items))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    """`torch.convolution` of half tensors in float32, a part of the batch at a time.

    Args:
        x: (N, C, ...), N at least 1, any dtype; likewise weight and bias.
        options: stride, padding, dilation, transposed, output_padding and groups.

    Returns:
        The output in x's dtype, in the layout that the convolution chooses.

    Example:
        >>> x, weight = torch.ones(2, 1, 3, 3).half(), torch.ones(1, 1, 3, 3).half()
        >>> convolve(x, weight, None, ([1] * 2, [0] * 2, [1] * 2, False, [0] * 2, 1)).flatten()
        tensor([9., 9.], dtype=torch.float16)
    """
    wide_weight, wide_bias = weight.float(), None if bias is None else bias.float()
    output = None
    for part in _chunks(x, weight, options):
        made = torch.convolution(x[part].float(), wide_weight, wide_bias, *options)
        if output is None:
            if len(made) == len(x):
                return made.to(x.dtype)
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            last = formats.get(made.dim(), torch.contiguous_format)
            layout = last if made.is_contiguous(memory_format=last) else torch.contiguous_format
            shape = (len(x), *made.shape[1:])
            output = torch.empty(shape, dtype=x.dtype, memory_format=layout)
        output[part] = made
    assert output is not None
    return output


def convolution_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    options: tuple[Any, ...],
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `convolve`: that of x in x's dtype, those of weight and bias in float32.

    Args:
        grad: of the output.
        x, weight, options: as they were.
        mask: which of the gradients of x, weight and bias are wanted; others are None.

    Example:
        >>> x = torch.ones(2, 1, 3, 3).half()
        >>> options = ([1] * 2, [0] * 2, [1] * 2, False, [0] * 2, 1)
        >>> one = torch.ones(1, 1, 1, 1).half()
        >>> convolution_gradients(x, x, one, options, (False, True, False))[1].item()
        18.0
    """
    transposed, groups = options[3], options[5]
    outputs = [weight.shape[1] * groups if transposed else weight.shape[0]]
    wide_weight = weight.float()
    dx = torch.empty_like(x) if mask[0] else None
    dweight = dbias = None
    for part in _chunks(x, weight, options):
        wide_grad = grad[part].float()
        dpart, more_weight, more_bias = torch.ops.aten.convolution_backward(
            wide_grad, x[part].float(), wide_weight, outputs, *options, list(mask)
        )
        if dx is not None and len(dpart) == len(x):
            dx = dpart.to(x.dtype)
        elif dx is not None:
            dx[part] = dpart
        dweight = more_weight if dweight is None else dweight.add_(more_weight)
        dbias = more_bias if dbias is None else dbias.add_(more_bias)
    return dx, dweight, dbias


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return convolve(x, weight, bias, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: nothing may be written in place
            transposed, groups = ctx.options[3], ctx.options[5]
            outputs = weight.shape[1] * groups if transposed else weight.shape[0]
            found = torch.ops.aten.convolution_backward(
                grad.float(), x.float(), weight.float(), [outputs], *ctx.options, list(mask)
            )
        else:
            found = convolution_gradients(grad, x, weight, ctx.options, mask)
        return *(d.half() if wanted else None for d, wanted in zip(found, mask, strict=True)), None


def _convolution(dimensions: int, transposed: bool) -> Callable[..., Tensor]:
    def numbers(value: Any) -> list[int]:
        return [value] * dimensions if isinstance(value, int) else list(value)

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x, weight, bias, stride, padding, dilation, output_padding, groups = (
            _transposed_arguments if transposed else _arguments
        )(*args, **kwargs)
        known = x.dim() == dimensions + 2 and len(x) > 0 and not isinstance(padding, str)
        if _must_be_plain() or not (known and _is_half(x) and _is_half(weight)):
            return _recomputed(function, *args, **kwargs)
        options = (*map(numbers, (stride, padding, dilation)), transposed, numbers(output_padding))
        return _Convolution.apply(x, weight, bias, (*options, groups))

    return run


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, 0, groups


def _transposed_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, output_padding, groups


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).half()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        wide = grad.float()
        rows = wide.reshape(-1, wide.shape[-1])
        dx = (wide @ weight.float()).half() if needs_x else None
        dweight = (rows.T @ x.float().reshape(-1, x.shape[-1])).half() if needs_weight else None
        return dx, dweight, rows.sum(0).half() if needs_bias else None


def _linear(
    function: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    if _must_be_plain() or weight.dim() != 2 or not (_is_half(input) and _is_half(weight)):
        return _recomputed(function, input, weight, bias)
    return _Linear.apply(input, weight, bias)


# ---- batch normalisation ----


def _batch_norm(
    function: Callable[..., Any],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Updates the running statistics at the first evaluation, and not at the second."""
    if not training or running_mean is None or running_var is None:
        return _recomputed(
            function, input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    running: list[Tensor] = [running_mean, running_var]

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if not running:
            return function(x, None, None, weight, bias, True, momentum, eps)
        wide = [statistic.float() for statistic in running]
        y = function(x, *wide, weight, bias, True, momentum, eps)
        with torch.no_grad():
            for statistic, value in zip(running, wide, strict=True):
                statistic.copy_(value)
        running.clear()
        return y

    return _recomputed(normalise, input, weight, bias)


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **{
        function: _convolution(dimensions, transposed)
        for dimensions, transposed, function in (
            (1, False, F.conv1d),
            (2, False, F.conv2d),
            (3, False, F.conv3d),
            (1, True, F.conv_transpose1d),
            (2, True, F.conv_transpose2d),
            (3, True, F.conv_transpose3d),
        )
    },
}
# Timed once on a busy AMD EPYC, one thread, 2026-11-24, torch's float16 to its float32:
# convolutions and matrix products take 20 times the time, softmax 5, normalisations 2 to 4; average
# pools in 3-D don't exist. Activations, maximum pools, means and sums take 0.3 to 2 times the time.
_APPLIED = {
    *_RULES,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.group_norm,
    F.instance_norm,
    F.layer_norm,
    F.log_softmax,
    F.multi_head_attention_forward,
    F.rms_norm,
    F.scaled_dot_product_attention,
    F.softmax,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.bmm,
    Tensor.log_softmax,
    Tensor.matmul,
    Tensor.softmax,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.einsum,
    torch.log_softmax,
    torch.matmul,
    torch.mm,
    torch.softmax,
}
