"""Registers ``ca3d::local_attention`` and its packed form with torch, with all their transforms.

- `torch.ops.ca3d.local_attention` and ``…_backward`` take q, k, v; the ``…_packed`` ops take one
  projection output that holds all three, and return one gradient for it.
- Kernels provide first derivatives. Double backward and whatever follows differentiate the
  definition in `reference`; forward mode runs it instead of the op.
- `attention`, `attention_packed` and their backward functions route a call: compiled code goes to
  the op itself, so that graphs contain it; eager code and functorch transforms each to the kind of
  `autograd.Function` that suits them (of the op's own autograd rule, eager code needs several times
  the time, and a rule for forward mode can't be registered at all: torch would return zero tangents
  without a word).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ca3d_kernels import backends, cuda
from ca3d_kernels.local_attention import reference
from ca3d_kernels.local_attention.layout import collapse_leading, empty_dense

EDGES = ("truncate", "zero", "shift")


class Options(NamedTuple):
    """Everything but the tensors, in the order of the op's schema; see `local_temporal_attention`.

    Attributes:
        kernel_size, dilation, causal, edge: the window.
        scale: factor of the logits; None is ``head_dim ** -0.5``.
        key_table: ``heads * kernel_size * 2`` integers, or none for each head's own keys.
        backend: the demanded backend, or ``""``.
    """

    kernel_size: int = 5
    dilation: int = 1
    causal: bool = False
    scale: float | None = None
    edge: str = "truncate"
    key_table: tuple[int, ...] = ()
    backend: str = ""

    def definition(self) -> dict[str, Any]:
        """The options as the keyword arguments of the functions in `reference`."""
        options = self._asdict()
        del options["backend"]
        return options


class Kernels(Protocol):
    """What a backend provides for this op.

    Operands are (outer, inner, heads, T, head_dim) with head_dim contiguous and other strides
    free. Results are written into the given tensors; nothing is accumulated.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: Options) -> None:
        """Writes the attention output into o."""

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        options: Options,
    ) -> None:
        """Writes the gradients of q, k and v into dq, dk and dv."""


class ReferenceKernels:
    """The definition in torch operations, on any device."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: Options) -> None:
        """Writes the attention output into o."""
        o.copy_(reference.attention(q, k, v, **options.definition()))

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        options: Options,
    ) -> None:
        """Writes the gradients of q, k and v into dq, dk and dv."""
        gradients = reference.attention_backward(grad, q, k, v, **options.definition())
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.copy_(gradient)


@functools.cache
def _load_cpu() -> Kernels:
    from ca3d_kernels.local_attention.cpu import NativeKernels

    return NativeKernels()


def _cpu_unavailable(device: str) -> str | None:
    if device != "cpu":
        return "it serves CPU tensors only"
    return backends.native_lacks("local_attention_forward", "local_attention_backward")


@functools.cache
def _load_cuda() -> Kernels:
    from ca3d_kernels.local_attention.cuda import CudaKernels

    return CudaKernels(cuda.library())


backends.register(
    "local_attention",
    backends.Implementation("reference", ReferenceKernels, lambda device: None),
)
backends.register("local_attention", backends.Implementation("cpu", _load_cpu, _cpu_unavailable))
backends.register("local_attention", backends.Implementation("cuda", _load_cuda, cuda.unavailable))


def _execute(
    call: Callable[[Any, list[Tensor], list[Tensor]], None],
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    options: Options,
) -> None:
    """Hands collapsed views of the operands to the chosen backend's kernels."""
    if outputs[0].numel() == 0:
        return
    with collapse_leading(inputs, outputs) as (sources, targets):
        backends.run(
            "local_attention",
            outputs[0].device.type,
            options.backend,
            lambda kernels: call(kernels, sources, targets),
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    o, window = empty_dense(q), Options(*options)
    _execute(lambda run, x, y: run.forward(*x, *y, window), (q, k, v), (o,), window)
    return o


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = (empty_dense(q), empty_dense(k), empty_dense(v))
    window = Options(*options)
    _execute(lambda run, x, y: run.backward(*x, *y, window), (grad, q, k, v), gradients, window)
    return gradients


def _packed_forward(qkv: Tensor, *options: Any) -> Tensor:
    return _forward(*qkv.unbind(-3), *options)


def _packed_backward(grad: Tensor, qkv: Tensor, *options: Any) -> Tensor:
    gradient, window = empty_dense(qkv), Options(*options)
    _execute(
        lambda run, x, y: run.backward(*x, *y, window),
        (grad, *qkv.unbind(-3)),
        gradient.unbind(-3),
        window,
    )
    return gradient


_TAIL = (
    "int kernel_size, int dilation, bool causal, float? scale, str edge, int[] key_table, "
    "str backend"
)
_SCHEMAS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "local_attention": (
        f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> Tensor",
        _forward,
        lambda q, k, v, *options: empty_dense(q),
    ),
    "local_attention_backward": (
        f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor, Tensor)",
        _backward,
        lambda grad, q, k, v, *options: (empty_dense(q), empty_dense(k), empty_dense(v)),
    ),
    "local_attention_packed": (
        f"(Tensor qkv, {_TAIL}) -> Tensor",
        _packed_forward,
        lambda qkv, *options: empty_dense(qkv.select(-3, 0)),
    ),
    "local_attention_packed_backward": (
        f"(Tensor grad, Tensor qkv, {_TAIL}) -> Tensor",
        _packed_backward,
        lambda grad, qkv, *options: empty_dense(qkv),
    ),
}

_library = torch.library.Library("ca3d", "FRAGMENT")
for _name, (_schema, _kernel, _fake) in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"ca3d::{_name}", _fake, lib=_library)


def _packed_definition(qkv: Tensor, **options: Any) -> Tensor:
    return reference.attention(*qkv.unbind(-3), **options)


def _packed_backward_definition(grad: Tensor, qkv: Tensor, **options: Any) -> Tensor:
    gradients = reference.attention_backward(grad, *qkv.unbind(-3), **options)
    return torch.stack(gradients, -3)


def _pullback(
    definition: Callable[..., Any], primals: tuple[Tensor, ...], cotangents: Any, options: Options
) -> tuple[Tensor, ...]:
    """Gradients of a definition, themselves differentiable in every mode."""
    vjp = torch.func.vjp(lambda *x: definition(*x, **options.definition()), *primals)
    outputs, pull = vjp[0], vjp[1]
    if isinstance(outputs, tuple):
        cotangents = tuple(
            torch.zeros_like(output) if cotangent is None else cotangent
            for output, cotangent in zip(outputs, cotangents, strict=True)
        )
    return pull(cotangents)


def _batched(info: Any, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Brings vmap's dimension to the front of every operand: one more leading dimension."""
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=False)
    ]


def _function(name: str, **methods: Callable[..., Any]) -> Any:
    """Subclass of autograd.Function with the given static methods."""
    static = {key: staticmethod(method) for key, method in methods.items()}
    return type(name, (torch.autograd.Function,), static)


def _differentiable(
    name: str,
    operands: int,
    definition: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Gives an op derivatives and batching, and returns the function that calls it.

    Args:
        name: name of the op.
        operands: how many tensors its schema starts with.
        definition: the same function in differentiable torch operations.
        gradient: differentiable function (gradient of the output, *operands, *options) -> gradients
            of the operands; None to differentiate the definition.

    Returns:
        A function of the op's arguments that works in eager and compiled code, under functorch
        transforms and in forward mode.
    """
    op = getattr(torch.ops.ca3d, name).default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:operands])
        ctx.options = Options(*inputs[operands:])

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if gradient is None:
            cotangents = grads if len(grads) > 1 else grads[0]
            result = _pullback(definition, ctx.saved_tensors, cotangents, ctx.options)
        else:
            result = gradient(*grads, *ctx.saved_tensors, *ctx.options)
        result = result if isinstance(result, tuple) else (result,)
        return *result, *(None for _ in Options._fields)

    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        result = call(*_batched(info, dims, arguments[:operands]), *arguments[operands:])
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    def run(*arguments: Any) -> Any:
        return op(*arguments)

    def run_and_save(ctx: Any, *arguments: Any) -> Any:
        # Straight to the kernel: this Function is the autograd rule.
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*arguments)
        setup_context(ctx, arguments, output)
        return output

    # Functions with setup_context are what functorch understands; those without are faster.
    eager = _function(name, forward=run_and_save, backward=backward)
    transformable = _function(
        name, forward=run, setup_context=setup_context, backward=backward, vmap=vmap
    )

    def call(*arguments: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        if forward_ad._current_level >= 0 or (transformed and torch.compiler.is_compiling()):
            options = Options(*arguments[operands:])
            return definition(*arguments[:operands], **options.definition())
        if torch.compiler.is_compiling():
            return op(*arguments)
        return (transformable if transformed else eager).apply(*arguments)

    qualified = f"ca3d::{name}"
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    torch.library.register_vmap(qualified, vmap, lib=_library)
    return call


attention_backward = _differentiable("local_attention_backward", 4, reference.attention_backward)
attention = _differentiable("local_attention", 3, reference.attention, attention_backward)
attention_packed_backward = _differentiable(
    "local_attention_packed_backward", 2, _packed_backward_definition
)
attention_packed = _differentiable(
    "local_attention_packed", 1, _packed_definition, attention_packed_backward
)
