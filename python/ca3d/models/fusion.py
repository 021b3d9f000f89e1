"""One call before inference or export: a model without normalisations and dropout."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ca3d.models.baselines.baseline import Baseline
from ca3d.models.fused import FusedCA3D
from ca3d.models.model import CA3D

__all__ = ["fuse"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def fuse(model: nn.Module, *, portable: bool = False) -> nn.Module:
    """Returns a copy of a model for inference: batch normalisations folded, dropout removed.

    The logits are the same to rounding. A CA3D model becomes a `ca3d.models.fused.FusedCA3D`, in
    float32, float16 or bfloat16 as it is, whose steps are kernels of `ca3d_kernels`. In any other
    model, each batch normalisation directly behind a convolution or a linear map becomes part of
    it; others stay.

    Args:
        model: the model; it is not changed.
        portable: whether a CA3D model uses torch's own operators only, for export to a runtime that
            doesn't have those of `ca3d_kernels`.

    Returns:
        The fused model in evaluation mode, with channels-last weights.

    Raises:
        TypeError: not a module, fused already, or with batch normalisations in a model that
            `torch.fx` can't follow.
        ValueError: a batch normalisation keeps no running statistics.

    Example:
        >>> import ca3d, torch
        >>> from ca3d.models import ca3d_tiny
        >>> model = ca3d.fuse(ca3d_tiny(num_classes=5))
        >>> model(torch.zeros(1, 3, 16, 32, 32)).shape
        torch.Size([1, 5])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # A CA3D made in inference mode gets ordinary weights: what the kernels make of those is kept.
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(model, CA3D):
            return FusedCA3D(model, portable=portable)
        return _fuse_any(model)


def _fuse_any(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _DROPOUTS):
                setattr(parent, name, nn.Identity())
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        # A baseline's check of its input can't be traced; nothing is folded across its two parts.
        _fold(model.features if isinstance(model, Baseline) else model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    return model


class _Tracer(fx.Tracer):
    """Does not look into what is folded, also where a library derives its own class from it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step of the graph."""
        foldable = isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | _BatchNorm)
        return foldable or super().is_leaf_module(m, module_qualified_name)


def _fold(model: nn.Module) -> None:
    """Folds in place what a trace of the model shows to follow a convolution or linear map."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TypeError(
            f"fuse can't follow {type(model).__name__}, which torch.fx can't trace: {reason}"
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts: dict[str, int] = {}
    for node in calls:
        counts[node.target] = counts.get(node.target, 0) + 1
    for node in calls:
        norm = model.get_submodule(node.target)
        source = node.args[0] if node.args else None
        if not isinstance(norm, _BatchNorm) or not isinstance(source, fx.Node):
            continue
        if source.op != "call_module" or len(source.users) != 1:
            continue
        if counts[node.target] != 1 or counts[str(source.target)] != 1:
            continue
        layer = model.get_submodule(str(source.target))
        if norm.running_mean is None:
            continue
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear):
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        model.set_submodule(str(source.target), fused)
        model.set_submodule(node.target, nn.Identity())
