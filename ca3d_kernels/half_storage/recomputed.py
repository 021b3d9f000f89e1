"""Any function in float32 on float16 tensors, by evaluating it again for the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def applies(arguments: Any) -> bool:
    """Whether there is a float16 CPU tensor among arguments.

    Example:
        >>> applies((torch.ones(2), 1)), applies(((), {"x": torch.ones(2).half()}))
        (False, True)
    """
    return any(is_half(x) for x in _pytree.tree_leaves(arguments))


def is_half(x: Any) -> bool:
    """Whether x is a float16 tensor on a CPU."""
    return isinstance(x, Tensor) and x.dtype == torch.float16 and x.device.type == "cpu"


def must_be_plain() -> bool:
    """Whether a transform of torch is at work that knows only torch's own operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function of float32 copies of all half tensors, its float32 results rounded to half.

    The graph keeps the tensors among the arguments; the gradient evaluates the function again.
    """
    if must_be_plain():
        args, kwargs = _pytree.tree_map(_wide, (args, kwargs))
        return _pytree.tree_map(_half, function(*args, **kwargs))
    leaves, structure = _pytree.tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    shape: list[_pytree.TreeSpec] = []

    def call(*tensors: Tensor) -> list[Any]:
        filled = list(leaves)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        args, kwargs = _pytree.tree_unflatten(filled, structure)
        outputs, spec = _pytree.tree_flatten(function(*args, **kwargs))
        shape[:] = [spec]
        return outputs

    tensors = [leaves[i] for i in places]
    for i in places:
        leaves[i] = None  # the closure must not keep them a second time
    outputs = _Recomputed.apply(call, *tensors)
    return _pytree.tree_unflatten(outputs, shape[0])


def _wide(x: Any) -> Any:
    return x.float() if is_half(x) else x


def _half(x: Any) -> Any:
    return x.half() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


class _Recomputed(torch.autograd.Function):
    """Keeps the tensors among the arguments, and evaluates the function again for the gradient."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., list[Any]], *tensors: Tensor) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        before = torch.get_rng_state()
        outputs = tuple(_half(x) for x in call(*map(_wide, tensors)))
        ctx.random = None if torch.equal(before, torch.get_rng_state()) else before
        found = [x for x in outputs if isinstance(x, Tensor)]
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return outputs

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
            pairs = [
                (y, _wide(g))
                for y, g in zip(ctx.call(*copies), grads, strict=True)
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
