"""State dicts as the published CA3D code writes them, filled by a recipe instead of training.

The golden outputs in tests/golden/golden_ca3d.npz were made by the published code with the weights
of this recipe: each tensor is drawn from a generator seeded by its name.
"""

import json
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ca3d.models import CA3D, create
from ca3d.models.published import entries

GOLDEN = Path(__file__).parents[1] / "golden" / "golden_ca3d.npz"
MODELS = {"ca3d": "ca3d", "ca3d_paper_pool": "ca3d", "ca3d_l": "ca3d_l"}


@cache
def golden(case: str) -> dict[str, np.ndarray]:
    """Everything that is stored of one of the MODELS, by name."""
    with np.load(GOLDEN) as arrays:
        return {
            key.removeprefix(f"{case}/"): arrays[key]
            for key in arrays
            if key.startswith(f"{case}/")
        }


def config(case: str) -> dict[str, Any]:
    return json.loads(str(golden(case)["config"]))


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """One tensor by the recipe, in float16."""
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    normal = {
        "pos_embed": 0.5,
        "qkv.weight": 3 / np.sqrt(shape[-1] if shape else 1),
        "qkv.bias": 0.5,
    }
    fan_in = shape[-1] if shape else 1
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if name.endswith("norm.weight"):
        values = random.uniform(0.5, 1.5, shape)
    elif name.endswith("running_var"):
        values = random.uniform(0.4, 2.5, shape)
    else:
        for ending, scale in (
            *normal.items(),
            ("norm.bias", 0.3),
            ("running_mean", 0.3),
            ("clf.weight", 0.05),
            ("weight", 1.2 / np.sqrt(fan_in)),
            ("", 0.2),
        ):
            if name.endswith(ending):
                values = random.standard_normal(shape) * scale
                break
    return torch.from_numpy(values.astype(np.float16))


def state_dict(model: CA3D, seed: int = 0) -> dict[str, Tensor]:
    """A published state dict for a model, each tensor under its first name."""
    return {e.published: draw(e.published, e.shape, seed) for e in entries(model)}


def with_second_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the names under which the published modules store the same tensors again."""
    rules = (
        (r"(\.proj\.(block|layer_list\.\d+))\.conv\.", r"\1.conv1."),
        (r"\.proj\.block\.", ".proj.layer_list.0."),
        (r"^(layer_list\.\d+)\.block\.", r"\1.layer_list.0."),
    )
    state = dict(state)
    for pattern, second in rules:
        state |= {re.sub(pattern, second, name): value for name, value in state.items()}
    return state


def with_pre_parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds a pre-parameter for each parameter, as float16 runs store them."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in state if not name.endswith(buffers)]
    return state | {f"pre_params.{name.replace('.', '/')}": state[name] * 100 for name in names}


@cache
def golden_model(case: str) -> CA3D:
    """The model of a golden case, without weights and without dropout; not to be changed."""
    settings = config(case)
    pool = "paper" if case == "ca3d_paper_pool" else None
    model = create(
        MODELS[case],
        num_classes=settings["num_classes"],
        frames=settings["clip"][0],
        preset="published",
        pool=pool,
        dropout=0.0,
    )
    assert isinstance(model, CA3D)
    return model
