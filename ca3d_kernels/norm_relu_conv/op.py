"""Registers ``ca3d::norm_relu_conv`` and its backward op with torch, with all their transforms.

- The op normalises the rectified y, adds a residual and convolves the result z, which it makes
  again in the backward pass instead of keeping it. Without a convolution, z is the result. Outputs
  that a call doesn't have are empty tensors.
- Kernels provide first derivatives. Double backward and whatever follows differentiate the
  definition in `reference`; forward mode and functorch transforms run it instead of the op.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.norm_relu_conv import convolution, reference

_OPERANDS = 6  # y, weight, bias, residual, conv_weight, conv_bias
_BACKWARD_OPERANDS = 9  # grad, grad_z, y, z, mean, variance, weight, bias, conv_weight


class Options(NamedTuple):
    """Everything but the tensors, in the order of the op's schema; see `norm_relu_conv`.

    Attributes:
        stride, padding: of the convolution, two integers each.
        groups: of the convolution.
        eps: added to the variance.
        relu: whether y is rectified first.
        keep_z: whether a call with a convolution returns z, too.
        backend: the demanded backend, or ``""``.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    groups: int = 1
    eps: float = 1e-5
    relu: bool = True
    keep_z: bool = False
    backend: str = ""

    def definition(self) -> dict[str, Any]:
        """The options as the keyword arguments of the functions in `reference`."""
        options = self._asdict()
        del options["backend"], options["keep_z"]
        return options

    @property
    def geometry(self) -> convolution.Geometry:
        """Of the convolution."""
        return convolution.Geometry(self.stride, self.padding, self.groups)


class Norm(NamedTuple):
    """A batch normalisation: what is learned, and how it is applied.

    Attributes:
        weight, bias: (C,).
        eps: added to the variance.
        relu: whether the input is rectified first.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    relu: bool


class Statistics(NamedTuple):
    """Mean and biased variance of every channel, (C,) in float64."""

    mean: Tensor
    variance: Tensor


class Kernels(Protocol):
    """What a backend provides for this op.

    Tensors are (N, C, H, W), physically a dense (N * H * W, C) matrix; statistics and the gradients
    of weight and bias are (C,) in float64. x is relu(y), or y without `relu`.
    """

    def normalise(self, y: Tensor, residual: Tensor | None, norm: Norm, z: Tensor) -> Statistics:
        """Writes ``(x - mean) / sqrt(variance + eps) * weight + bias + residual``, rounded to y's
        dtype, into z. Returns mean and variance of x."""

    def normalise_again(self, y: Tensor, norm: Norm, statistics: Statistics, z: Tensor) -> None:
        """Writes the same without a residual, by known statistics."""

    def backward(
        self,
        y: Tensor,
        dz: Tensor,
        more: Tensor | None,
        norm: Norm,
        statistics: Statistics,
        dy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Adds `more` to dz in place, then writes the gradient of y into dy, which may be dz, or
        None where it isn't wanted. Returns the gradients of weight and bias."""


class ReferenceKernels:
    """The definition in torch operations, on any device."""

    def normalise(self, y: Tensor, residual: Tensor | None, norm: Norm, z: Tensor) -> Statistics:
        """See `Kernels`."""
        statistics = Statistics(*(m.double() for m in reference.statistics(y, norm.relu)))
        value = _normalised(y, norm, statistics)
        if residual is not None:
            value += residual
        z.copy_(value.to(y.dtype))
        return statistics

    def normalise_again(self, y: Tensor, norm: Norm, statistics: Statistics, z: Tensor) -> None:
        """See `Kernels`."""
        z.copy_(_normalised(y, norm, statistics).to(y.dtype))

    def backward(
        self,
        y: Tensor,
        dz: Tensor,
        more: Tensor | None,
        norm: Norm,
        statistics: Statistics,
        dy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if more is not None:
            dz += more
        inverse = (statistics.variance + norm.eps).rsqrt()
        wide = dz.to(reference.computed(dz.dtype))
        normalised = _centred(y, statistics.mean, norm.relu).mul_(_column(inverse, y))
        dweight, dbias = (wide * normalised).sum((0, 2, 3)), wide.sum((0, 2, 3))
        if dy is not None:
            count = y.numel() // y.shape[1]
            inner = wide - _column(dbias / count, y)
            inner -= normalised.mul_(_column(dweight / count, y))
            inner *= _column(norm.weight.double() * inverse, y)
            dy.copy_(inner.masked_fill_(y <= 0, 0) if norm.relu else inner)
        return dweight.double(), dbias.double()


def _normalised(y: Tensor, norm: Norm, statistics: Statistics) -> Tensor:
    scale = norm.weight.double() * (statistics.variance + norm.eps).rsqrt()
    centred = _centred(y, statistics.mean, norm.relu)
    return centred.mul_(_column(scale, y)).add_(_column(norm.bias, y))


def _column(values: Tensor, y: Tensor) -> Tensor:
    return values.to(reference.computed(y.dtype))[:, None, None]


def _centred(y: Tensor, mean: Tensor, relu: bool) -> Tensor:
    x = y.to(reference.computed(y.dtype))
    return (x.relu() if relu else x) - _column(mean, y)


@functools.cache
def _load_cpu() -> Kernels:
    from ca3d_kernels.norm_relu_conv.cpu import NativeKernels

    return NativeKernels()


def _cpu_unavailable(device: str) -> str | None:
    if device != "cpu":
        return "it serves CPU tensors only"
    return backends.native_lacks(
        "normalise", "normalise_again", "normalise_backward", "advise_huge_pages"
    )


backends.register(
    "norm_relu_conv",
    backends.Implementation("reference", ReferenceKernels, lambda device: None),
)
backends.register("norm_relu_conv", backends.Implementation("cpu", _load_cpu, _cpu_unavailable))


def _empty(like: Tensor, shape: Any = None) -> Tensor:
    """Uninitialised (N, C, H, W), physically (N, H, W, C)."""
    return torch.empty(
        like.shape if shape is None else shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _dense(x: Tensor) -> Tensor:
    """The same values, physically (N, H, W, C); a copy only if they aren't."""
    return x if x.movedim(1, -1).is_contiguous() else _empty(x).copy_(x)


def _forward(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor | None, ...]:
    """What the op returns, with None for what a call doesn't have."""
    options = Options(*arguments)
    y = _dense(y)
    residual = None if residual is None else _dense(residual)
    norm, z = Norm(weight, bias, options.eps, options.relu), _empty(y)
    statistics = _run(y, options, lambda run: run.normalise(y, residual, norm, z))
    if conv_weight is None:
        return None, z, *statistics
    output = _dense(convolution.convolve(z, conv_weight, conv_bias, options.geometry))
    return output, z if options.keep_z else None, *statistics


def _backward(
    grad: Tensor | None,
    grad_z: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor | None, ...]:
    """What the backward op returns, with None for what isn't wanted."""
    needs_z, needs_y, options = arguments[0], arguments[1], Options(*arguments[2:])
    norm, statistics = Norm(weight, bias, options.eps, options.relu), Statistics(mean, variance)
    y = _dense(y)
    own = grad is not None and conv_weight is not None
    dz, more = None, None if grad_z is None else _dense(grad_z)
    conv_gradients: list[Tensor | None] = [None, None]
    if grad is not None and conv_weight is not None:
        if z is None:
            z = _empty(y)
            made = z
            _run(y, options, lambda run: run.normalise_again(y, norm, statistics, made))
            del made
        inputs = [z]
        del z
        dz, *gradients = convolution.gradients(
            _dense(grad), inputs, y, conv_weight, options.geometry
        )
        dz, conv_gradients = _dense(dz), [x.to(y.dtype) for x in gradients]
    else:
        dz, more = more, None
    dy = None
    if needs_y:
        dy = dz if own and not needs_z else _empty(y)
    dweight, dbias = _run(y, options, lambda run: run.backward(y, dz, more, norm, statistics, dy))
    return (
        dz if own and needs_z else None,
        dy,
        dweight.to(weight.dtype),
        dbias.to(bias.dtype),
        *conv_gradients,
    )


def _as_op(kernel: Callable[..., tuple[Tensor | None, ...]], y: int) -> Callable[..., Any]:
    """The kernel with an empty tensor, of the dtype of its argument number y, for None."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        results = kernel(*arguments)
        return tuple([arguments[y].new_empty(0) if x is None else x for x in results])

    return run


def _run(y: Tensor, options: Options, call: Callable[[Any], Any]) -> Any:
    return backends.run("norm_relu_conv", y.device.type, options.backend, call)


def _fake_forward(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(*arguments)
    mean, variance = (y.new_empty(y.shape[1], dtype=torch.float64) for _ in range(2))
    if conv_weight is None:
        return y.new_empty(0), _empty(y), mean, variance
    size = options.geometry.output_size(y, conv_weight)
    output = _empty(y, (y.shape[0], conv_weight.shape[0], *size))
    return output, _empty(y) if options.keep_z else y.new_empty(0), mean, variance


def _fake_backward(
    grad: Tensor | None,
    grad_z: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor | None,
    needs_z: bool,
    needs_y: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    own = grad is not None and conv_weight is not None
    conv_gradients = [y.new_empty(0), y.new_empty(0)]
    if grad is not None and conv_weight is not None:
        conv_gradients = [
            torch.empty_like(conv_weight),
            conv_weight.new_empty(conv_weight.shape[0]),
        ]
    return (
        _empty(y) if own and needs_z else y.new_empty(0),
        _empty(y) if needs_y else y.new_empty(0),
        torch.empty_like(weight),
        torch.empty_like(bias),
        *conv_gradients,
    )


_TAIL = "int[] stride, int[] padding, int groups, float eps, bool relu, bool keep_z, str backend"
_library = torch.library.Library("ca3d", "FRAGMENT")
_library.define(
    "norm_relu_conv(Tensor y, Tensor weight, Tensor bias, Tensor? residual, Tensor? conv_weight, "
    f"Tensor? conv_bias, {_TAIL}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "norm_relu_conv_backward(Tensor? grad, Tensor? grad_z, Tensor y, Tensor? z, Tensor mean, "
    "Tensor variance, Tensor weight, Tensor bias, Tensor? conv_weight, bool needs_z, bool needs_y, "
    f"{_TAIL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _kernel, _fake in (
    ("norm_relu_conv", _as_op(_forward, 0), _fake_forward),
    ("norm_relu_conv_backward", _as_op(_backward, 2), _fake_backward),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"ca3d::{_name}", _fake, lib=_library)

_op = torch.ops.ca3d.norm_relu_conv.default
_backward_op = torch.ops.ca3d.norm_relu_conv_backward.default


# ---- derivatives ----


def _definition(*arguments: Any) -> tuple[Tensor, ...]:
    """The op in differentiable torch operations."""
    options = Options(*arguments[_OPERANDS:])
    y, conv_weight = arguments[0], arguments[4]
    output, z = reference.norm_relu_conv(*arguments[:_OPERANDS], **options.definition())
    mean, variance = (m.detach().double() for m in reference.statistics(y, options.relu))
    keep = options.keep_z or conv_weight is None
    return output, z if keep else y.new_empty(0), mean, variance


def _backward_definition(*arguments: Any) -> tuple[Tensor, ...]:
    """The backward op in differentiable torch operations."""
    grad, grad_z, y, z, _, _, weight, bias, conv_weight = arguments[:_BACKWARD_OPERANDS]
    needs_z, needs_y = arguments[_BACKWARD_OPERANDS : _BACKWARD_OPERANDS + 2]
    options = Options(*arguments[_BACKWARD_OPERANDS + 2 :])
    dz, dy, *others = reference.norm_relu_conv_backward(
        grad, grad_z, y, z, weight, bias, conv_weight, **options.definition()
    )
    own = grad is not None and conv_weight is not None
    nothing = y.new_empty(0)
    return dz if own and needs_z else nothing, dy if needs_y else nothing, *others


def _pullback(
    definition: Callable[..., tuple[Tensor, ...]],
    arguments: list[Any],
    differentiable: list[int],
    cotangents: tuple[Any, ...],
) -> list[Any]:
    """Gradients of a definition, themselves differentiable, one for each argument."""

    def run(*primals: Tensor) -> tuple[Tensor, ...]:
        filled = list(arguments)
        for i, x in zip(differentiable, primals, strict=True):
            filled[i] = x
        return definition(*filled)

    vjp = torch.func.vjp(run, *(arguments[i] for i in differentiable))
    outputs, pull = vjp[0], vjp[1]
    gradients: list[Any] = [None] * len(arguments)
    cotangents = tuple(
        torch.zeros_like(x) if c is None else c for x, c in zip(outputs, cotangents, strict=True)
    )
    for i, gradient in zip(differentiable, pull(cotangents), strict=True):
        gradients[i] = gradient
    return gradients


def _present(x: Tensor | None) -> Tensor | None:
    """None for the gradient of an output that the call doesn't have."""
    return None if x is None or x.numel() == 0 else x


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, weight, bias, residual, conv_weight = inputs[:5]
    _, z, mean, variance = output
    # With a residual, z is a sum that the model keeps anyway; else y and the statistics give it.
    kept = z if residual is not None and conv_weight is not None else None
    ctx.save_for_backward(y, kept, mean, variance, weight, bias, conv_weight)
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)
    ctx.options = inputs[_OPERANDS:]


def _differentiate(ctx: Any, grad: Any, grad_z: Any, *_: Any) -> tuple[Any, ...]:
    grad, grad_z = _present(grad), _present(grad_z)
    nothing = (None,) * len(Options._fields)
    if grad is None and grad_z is None:
        return *(None,) * _OPERANDS, *nothing
    needs_y, needs_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    dz, dy, dweight, dbias, dconv_weight, dconv_bias = _call_backward(
        grad, grad_z, *ctx.saved_tensors, needs_residual, needs_y, *ctx.options
    )
    if grad is None:
        dz, dconv_weight, dconv_bias = grad_z, None, None
    return (
        dy if needs_y else None,
        dweight,
        dbias,
        dz if needs_residual else None,
        dconv_weight,
        dconv_bias if ctx.needs_input_grad[5] else None,
        *nothing,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_BACKWARD_OPERANDS])
    ctx.options = inputs[_BACKWARD_OPERANDS:]
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
    arguments = [*ctx.saved_tensors, *ctx.options]
    # Not the statistics: they are a function of y, and the definition makes them from it.
    differentiable = [i for i in (0, 1, 2, 3, 6, 7, 8) if arguments[i] is not None]
    return tuple(_pullback(_backward_definition, arguments, differentiable, cotangents))


def _one_by_one(op: Any) -> Callable[..., Any]:
    """A vmap rule that runs the op on one slice after the other: each has its own statistics."""

    def rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        slices = (
            op(
                *(
                    x.select(dim, i) if isinstance(dim, int) else x
                    for x, dim in zip(arguments, dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        )
        results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return results, (0,) * len(results)

    return rule


def _called(op: Any, kernel: Callable[..., Any], y: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The op below autograd; its kernel itself where nobody watches the op go by.

    On small tensors torch's way to a kernel in Python takes longer than the kernel.
    """
    watched = torch._C._len_torch_dispatch_stack() or not (y.is_cpu or y.is_cuda)
    if not watched and all(map(_is_plain, arguments)):
        return kernel(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _is_plain(argument: Any) -> bool:
    if not isinstance(argument, Tensor):
        return True
    # The gradients that autograd hands over under `is_grads_batched` are in torch's older vmap.
    batched = torch._C._functorch.is_legacy_batchedtensor(argument)
    return type(argument) in (Tensor, torch.nn.Parameter) and not batched


class _Forward(torch.autograd.Function):
    """The op's autograd rule; see `_called` for why it isn't torch.library's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = _called(_op, _forward, arguments[0], arguments)
        _save(ctx, arguments, output)
        return output

    backward = staticmethod(_differentiate)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = _called(_backward_op, _backward, arguments[2], arguments)
        _save_backward(ctx, arguments, output)
        return output

    backward = staticmethod(_differentiate_backward)


def _transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _call_backward(*arguments: Any) -> Any:
    if _transformed():
        return _backward_definition(*arguments)
    if torch.compiler.is_compiling():
        return _backward_op(*arguments)
    if not torch.is_grad_enabled():
        return _called(_backward_op, _backward, arguments[2], arguments)
    return _Backward.apply(*arguments)


def norm_relu_conv(*arguments: Any) -> tuple[Any, ...]:
    """Runs the op, or its definition under a transform that the op doesn't know.

    Args:
        *arguments: those of the op's schema.

    Returns:
        The convolution's output, z, mean and variance; None or an empty tensor for what a call
        doesn't have.

    Example:
        >>> y, one = torch.randn(2, 3, 4, 4), torch.ones(3)
        >>> norm_relu_conv(y, one, one, None, None, None, *Options())[1].shape
        torch.Size([2, 3, 4, 4])
    """
    if _transformed():
        return _definition(*arguments)
    if torch.compiler.is_compiling():
        return _op(*arguments)
    return _Forward.apply(*arguments)


for _name, _overload, _rule, _setup in (
    ("norm_relu_conv", _op, _differentiate, _save),
    ("norm_relu_conv_backward", _backward_op, _differentiate_backward, _save_backward),
):
    torch.library.register_autograd(f"ca3d::{_name}", _rule, setup_context=_setup, lib=_library)
    torch.library.register_vmap(f"ca3d::{_name}", _one_by_one(_overload), lib=_library)
