"""Weights computed from pre-parameters inside the autograd graph, for any torch optimizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ca3d_kernels.preparam_step.mapping import LinearMapping, PreParamMapping


class _MapGradient(torch.autograd.Function):
    """Equation 2; it has no derivative, and says so instead of passing a meaningless one on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, param: Tensor, mapping: PreParamMapping) -> Tensor:
        return mapping.map_grad(grad, param)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "pre_parameter can't be differentiated twice: its gradient is the mapped gradient of "
            "equation 2, which is not the derivative of a function"
        )


class _PreParameter(torch.autograd.Function):
    """Equation 1 forward, equation 2 backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre_param: Tensor, mapping: PreParamMapping) -> Tensor:
        return mapping.to_param(pre_param)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.mapping = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (param,) = ctx.saved_tensors
        return _MapGradient.apply(grad, param, ctx.mapping), None


def _check_mapping(mapping: object) -> PreParamMapping:
    if not isinstance(mapping, PreParamMapping):
        raise TypeError(
            f"mapping must be a PreParamMapping such as LinearMapping(128.0), got {mapping!r}"
        )
    return mapping


def pre_parameter(pre_param: Tensor, mapping: PreParamMapping | None = None) -> Tensor:
    """Weight of a pre-parameter, with the mapped gradient of the paper as its gradient.

    Forward is equation 1, w = w(theta). Backward is equation 2: theta receives
    `mapping.map_grad(dL/dw, w)`. This is on purpose not the chain rule. The linear map
    theta = c w yields c dL/dw, where the chain rule would give dL/dw / c; a step of SGD on theta
    then changes w exactly as a step of SGD on w would.

    It works under `torch.compile`, `torch.func.grad` and `torch.func.vmap`. Differentiating the
    mapped gradient again raises a RuntimeError, and forward-mode differentiation is not defined.

    Args:
        pre_param: theta, any shape, floating point.
        mapping: the map; None is `LinearMapping(128.0)`.

    Returns:
        w, same shape and dtype.

    Raises:
        TypeError: `pre_param` is not a floating-point tensor or `mapping` not a mapping.

    Example:
        >>> theta = torch.tensor([64.0], requires_grad=True)
        >>> w = pre_parameter(theta, LinearMapping(128.0))
        >>> (3 * w).sum().backward()
        >>> w.item(), theta.grad.item()
        (0.5, 384.0)
    """
    if not isinstance(pre_param, Tensor):
        raise TypeError(f"pre_param must be a tensor, got {type(pre_param).__name__}")
    if not pre_param.dtype.is_floating_point:
        raise TypeError(f"pre_param must be of a floating-point dtype, got {pre_param.dtype}")
    mapping = LinearMapping() if mapping is None else _check_mapping(mapping)
    return _PreParameter.apply(pre_param, mapping)


class PreParametrization(nn.Module):
    """`pre_parameter` as a parametrization for `torch.nn.utils.parametrize`.

    Args:
        mapping: the map; None is `LinearMapping(128.0)`.

    Raises:
        TypeError: `mapping` is not a mapping.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = parametrize.register_parametrization(layer, "weight", PreParametrization())
        >>> theta = layer.parametrizations.weight.original
        >>> bool((theta == 128 * layer.weight).all())
        True
    """

    def __init__(self, mapping: PreParamMapping | None = None) -> None:
        super().__init__()
        self.mapping = LinearMapping() if mapping is None else _check_mapping(mapping)

    def forward(self, pre_param: Tensor) -> Tensor:
        """Weight of a pre-parameter."""
        return pre_parameter(pre_param, self.mapping)

    def right_inverse(self, param: Tensor) -> Tensor:
        """Pre-parameter of a weight that is assigned."""
        return self.mapping.to_pre_param(param)

    def extra_repr(self) -> str:
        """The map."""
        return repr(self.mapping)


def parametrize_with_pre_parameters(
    module: nn.Module, mapping: PreParamMapping | None = None
) -> nn.Module:
    """Replaces every floating-point parameter of a module by its pre-parameter.

    Afterwards `module.parameters()` are the pre-parameters, so that any torch optimizer steps them,
    and each weight is computed from its pre-parameter when it is read (once each, inside
    `torch.nn.utils.parametrize.cached()`).

    Args:
        module: changed in place, its submodules included.
        mapping: the map; None is `LinearMapping(128.0)`.

    Returns:
        The module.

    Raises:
        TypeError: `mapping` is not a mapping.

    Example:
        >>> model = parametrize_with_pre_parameters(nn.Linear(2, 1))
        >>> [name for name, _ in model.named_parameters()]
        ['parametrizations.weight.original', 'parametrizations.bias.original']
    """
    parametrization = PreParametrization(mapping)
    for submodule in list(module.modules()):
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            if parameter.dtype.is_floating_point:
                parametrize.register_parametrization(submodule, name, parametrization)
    return module
