"""The models of the package, by name (`create`, `names`) or as functions.

Example:
    >>> import torch
    >>> from ca3d.models import create
    >>> create("ca3d_tiny", num_classes=5).eval()(torch.zeros(1, 3, 16, 32, 32)).shape
    torch.Size([1, 5])
"""

from ca3d.models.macs import count_macs
from ca3d.models.model import CA3D, ca3d, ca3d_l, ca3d_tiny
from ca3d.models.registry import create, create_for_clips, decay_groups, names, recipe, register
from ca3d.models.variants import ca3d_variant

__all__ = [
    "CA3D",
    "ca3d",
    "ca3d_l",
    "ca3d_tiny",
    "ca3d_variant",
    "count_macs",
    "create",
    "create_for_clips",
    "decay_groups",
    "names",
    "recipe",
    "register",
]
