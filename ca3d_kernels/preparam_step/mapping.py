"""Element-wise maps between a weight and the pre-parameter that is trained in its place."""

import math
from dataclasses import dataclass

from torch import Tensor


class PreParamMapping:
    """Map between a weight w and its pre-parameter theta, element by element.

    A subclass defines the three methods below with torch operations on tensors of any shape and
    floating-point dtype; each must work element by element and return a new tensor of its
    argument's dtype. A subclass runs in torch operations; only maps that state `linear_scales` run
    in the compiled kernels. `repr(mapping)` is stored in an optimizer's state_dict and compared
    when it is loaded: it must name every constant of the map.

    Example:
        >>> import torch
        >>> class Cube(PreParamMapping):
        ...     def to_param(self, pre_param):
        ...         return pre_param**3
        ...
        ...     def to_pre_param(self, param):
        ...         return param.sign() * param.abs() ** (1 / 3)
        ...
        ...     def map_grad(self, grad, param):
        ...         return grad
        >>> Cube().to_param(torch.tensor([2.0, -1.0]))
        tensor([ 8., -1.])
    """

    def to_param(self, pre_param: Tensor) -> Tensor:
        """Weight w of a pre-parameter theta (equation 1 of the paper).

        Args:
            pre_param: theta, any shape, floating point.

        Returns:
            w, same shape and dtype.

        Raises:
            NotImplementedError: the subclass does not define it.

        Example:
            >>> import torch
            >>> LinearMapping(128.0).to_param(torch.tensor([64.0]))
            tensor([0.5000])
        """
        raise NotImplementedError(f"{type(self).__name__} does not define to_param")

    def to_pre_param(self, param: Tensor) -> Tensor:
        """Pre-parameter theta of a weight w, the inverse of `to_param`.

        Args:
            param: w, any shape, floating point.

        Returns:
            theta, same shape and dtype.

        Raises:
            NotImplementedError: the subclass does not define it.

        Example:
            >>> import torch
            >>> LinearMapping(128.0).to_pre_param(torch.tensor([0.5]))
            tensor([64.])
        """
        raise NotImplementedError(f"{type(self).__name__} does not define to_pre_param")

    def map_grad(self, grad: Tensor, param: Tensor) -> Tensor:
        """Gradient that theta is stepped with, from the gradient of w (equation 2 of the paper).

        Args:
            grad: gradient of the loss with respect to w.
            param: w, same shape and dtype.

        Returns:
            The mapped gradient, same shape and dtype. It need not be the derivative with respect
            to theta: for the linear map it is c dL/dw, where the chain rule would give dL/dw / c.

        Raises:
            NotImplementedError: the subclass does not define it.

        Example:
            >>> import torch
            >>> LinearMapping(128.0).map_grad(torch.tensor([1.0]), torch.tensor([0.5]))
            tensor([128.])
        """
        raise NotImplementedError(f"{type(self).__name__} does not define map_grad")

    @property
    def linear_scales(self) -> tuple[float, float] | None:
        """(c, k) of a map with w = theta / c and mapped gradient k * grad, else None."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _positive(value: object, name: str) -> float:
    """The value as a float, checked to be a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class LinearMapping(PreParamMapping):
    """Linear map theta = c w, with mapped gradient c dL/dw (equations 1 and 2 of the paper).

    In exact arithmetic, SGD on theta with this map (momentum and weight decay included) equals SGD
    on w, step for step: only rounding and the range of the stored numbers differ. When c is a power
    of two, theta / c is exact, and float16 training with one rounding a stored value is bit for bit
    plain float16 SGD as long as no value is subnormal or overflows: the gain of the map is that
    theta and momentum reach the subnormal range c times later (and overflow c times earlier).

    Args:
        scale: c, positive and finite. The default, 128, is a power of two.
        loss_factor: factor that the loss is multiplied with before the backward pass; gradients
            then arrive multiplied by it, and the mapped gradient is (c / loss_factor) * grad.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is not positive and finite.

    Example:
        >>> import torch
        >>> mapping = LinearMapping(128.0)
        >>> theta = mapping.to_pre_param(torch.tensor([0.25], dtype=torch.float16))
        >>> theta, mapping.to_param(theta)
        (tensor([32.], dtype=torch.float16), tensor([0.2500], dtype=torch.float16))
    """

    scale: float = 128.0
    loss_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _positive(self.scale, "scale"))
        object.__setattr__(self, "loss_factor", _positive(self.loss_factor, "loss_factor"))

    @property
    def linear_scales(self) -> tuple[float, float]:
        """(c, c / loss_factor)."""
        return self.scale, self.scale / self.loss_factor

    def to_param(self, pre_param: Tensor) -> Tensor:
        """Weight theta / c; see `PreParamMapping.to_param`."""
        return pre_param / self.scale

    def to_pre_param(self, param: Tensor) -> Tensor:
        """Pre-parameter c w; see `PreParamMapping.to_pre_param`."""
        return param * self.scale

    def map_grad(self, grad: Tensor, param: Tensor) -> Tensor:
        """Mapped gradient (c / loss_factor) * grad; see `PreParamMapping.map_grad`."""
        return grad * (self.scale / self.loss_factor)


def _signed_power(value: Tensor, power: float) -> Tensor:
    """sign(x) |x|^p."""
    return value.sign() * value.abs() ** power


@dataclass(frozen=True)
class PublishedMapping(PreParamMapping):
    """Power map with an affine offset, as in the code published with the paper (arXiv 2505.19928).

    With S_p(x) = sign(x) |x|^p and F_c(u) = S_p(c u) for p >= 1, c^p S_p(u) for p < 1:

        theta = max(F_h(w - a) - S_p(-h a), 0) + min(F_h(w + a) - S_p(h a), 0),

    `to_param` inverts it branch by branch, and the gradient is mapped either like the weight, with
    g / v for h inside F ("map"), or by the chain rule for a loss multiplied by v ("chain"). Every
    operation rounds to the dtype of its tensors, so in float16 each step of these formulas is
    rounded, as in the published code.

    Args:
        weight_scale: h, positive.
        loss_factor: v, the factor that the loss is multiplied with before the backward pass.
        gradient_scale: g, positive.
        power: p, positive.
        offset: a, not positive.
        chain_rule: map gradients by the chain rule instead of like the weight.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> mapping = PublishedMapping(weight_scale=100.0, loss_factor=0.1, gradient_scale=100.0)
        >>> mapping.to_pre_param(torch.tensor([0.5, -0.25]))
        tensor([ 50., -25.])
    """

    weight_scale: float = 1.0
    loss_factor: float = 1.0
    gradient_scale: float = 1.0
    power: float = 1.0
    offset: float = 0.0
    chain_rule: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_scale", "loss_factor", "gradient_scale", "power"):
            object.__setattr__(self, name, _positive(getattr(self, name), name))
        if not (isinstance(self.offset, int | float) and -math.inf < self.offset <= 0):
            raise ValueError(f"offset must be finite and not positive, got {self.offset!r}")

    @property
    def linear_scales(self) -> tuple[float, float] | None:
        """(h, g / v) when power is 1 and offset 0, else None."""
        if self.power == 1 and self.offset == 0:
            return self.weight_scale, self.gradient_scale / self.loss_factor
        return None

    def _stretch(self, value: Tensor, scale: float) -> Tensor:
        """F_c: the order of scaling and power keeps the larger intermediate inside float16."""
        if self.power >= 1:
            return _signed_power(value * scale, self.power)
        return _signed_power(value, self.power) * scale**self.power

    def _shift(self, scale: float) -> float:
        """S_p(-c a), the value that the positive branch subtracts so that 0 maps to 0."""
        return (-scale * self.offset) ** self.power if self.offset else 0.0

    def _apply(self, value: Tensor, scale: float) -> Tensor:
        shift = self._shift(self.weight_scale)
        positive = self._stretch(value - self.offset, scale) - shift
        negative = self._stretch(value + self.offset, scale) + shift
        return positive.clamp(min=0) + negative.clamp(max=0)

    def to_param(self, pre_param: Tensor) -> Tensor:
        """Weight of a pre-parameter; see `PreParamMapping.to_param`."""
        shift = self._shift(self.weight_scale)
        positive = self._unstretch(pre_param + shift) + self.offset
        negative = self._unstretch(pre_param - shift) - self.offset
        return positive.clamp(min=0) + negative.clamp(max=0)

    def _unstretch(self, value: Tensor) -> Tensor:
        """Inverse of F_h."""
        if self.power >= 1:
            return _signed_power(value, 1 / self.power) / self.weight_scale
        return _signed_power(value / self.weight_scale**self.power, 1 / self.power)

    def to_pre_param(self, param: Tensor) -> Tensor:
        """Pre-parameter of a weight; see `PreParamMapping.to_pre_param`."""
        return self._apply(param, self.weight_scale)

    def map_grad(self, grad: Tensor, param: Tensor) -> Tensor:
        """Gradient for theta, of a loss multiplied by v; see `PreParamMapping.map_grad`."""
        if not self.chain_rule:
            return self._apply(grad, self.gradient_scale / self.loss_factor)
        pre_param = self.to_pre_param(param)
        shift = self._shift(self.gradient_scale)
        positive = self._slope(pre_param + shift).masked_fill(pre_param < 0, 0)
        negative = self._slope(pre_param - shift).masked_fill(pre_param > 0, 0)
        # At theta = 0 both branches count, so zero-initialised weights take a doubled first step.
        return grad / self.loss_factor * (positive + negative)

    def _slope(self, value: Tensor) -> Tensor:
        """Derivative of `to_param`'s branch: q |x|^(q - 1) / g with q = 1 / p."""
        exponent = 1 / self.power
        return value.abs() ** (exponent - 1) * exponent / self.gradient_scale


_PUBLISHED = {
    "f16": PublishedMapping(weight_scale=100.0, loss_factor=0.1, gradient_scale=100.0),
    "f16-sqr": PublishedMapping(loss_factor=0.1, power=2.0, offset=-0.5, chain_rule=True),
    "f16-root": PublishedMapping(
        weight_scale=100.0, loss_factor=0.1, gradient_scale=100.0, power=0.5, offset=-0.25
    ),
}


def published_mapping(name: str) -> PublishedMapping:
    """One of the maps of the code published with the paper.

    All three expect gradients of loss * 0.1, as the published training loop computes them.

    Args:
        name: "f16" (theta = 100 w, the paper's method), "f16-sqr" (quadratic near zero, gradients
            by the chain rule) or "f16-root" (square root, gradients mapped like weights).

    Returns:
        The map; with `PreParamSGD(..., rounding="published")` it reproduces the published float16
        arithmetic bit for bit.

    Raises:
        ValueError: unknown name.

    Example:
        >>> import torch
        >>> published_mapping("f16").to_pre_param(torch.tensor([0.5]))
        tensor([50.])
    """
    if name not in _PUBLISHED:
        raise ValueError(f"unknown published mapping {name!r}; allowed: {', '.join(_PUBLISHED)}")
    return _PUBLISHED[name]
