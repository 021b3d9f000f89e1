"""What a small model learns from rendered clips, with and without the order of their frames."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ca3d import models
from ca3d.data.embedded.recipe import Recipe

TRAIN, TEST, STEPS, BATCH = 1200, 240, 500, 32
# The small model of the demo: its time goes into the temporal halves.
OPTIONS: dict[str, Any] = {
    "spatial_depths": [1, 1, 1, 1],
    "temporal_depths": [0, 0, 1, 1],
    "dropout": 0.0,
}


def render(recipe: Recipe, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Clips (N, 3, T, S, S), roughly normalised, and labels (N,)."""
    videos = np.stack([recipe.render(split, index)[0] for index in range(count)])
    clips = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float()
    labels = torch.tensor([recipe.label(index) for index in range(count)])
    return (clips - clips.mean()) / clips.std(), labels


def shuffle(clips: Tensor, generator: torch.Generator) -> Tensor:
    """The frames of each clip in a random order."""
    order = torch.rand(clips.shape[0], clips.shape[2], generator=generator).argsort(1)
    return clips.gather(2, order[:, None, :, None, None].expand_as(clips))


def accuracy(recipe: Recipe, shuffled: bool) -> float:
    clips, labels = render(recipe, "train", TRAIN)
    unseen, unseen_labels = render(recipe, "test", TEST)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.create("ca3d_tiny", num_classes=len(recipe.classes), **OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 6e-3, total_steps=STEPS, pct_start=0.15
    )
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(TRAIN, (BATCH,), generator=generator)
        batch = shuffle(clips[chosen], generator) if shuffled else clips[chosen]
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    if shuffled:
        unseen = shuffle(unseen, generator)
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(1) for part in unseen.split(50)])
    return float((guesses == unseen_labels).float().mean())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_motion_order_needs_the_order_of_frames() -> None:
    """A model learns the classes on unseen sprites, and nothing from a bag of frames."""
    recipe = Recipe("motion-order", 32, 16, 16, 0.0, 0)
    assert accuracy(recipe, shuffled=False) > 0.6
    chance = 1 / len(recipe.classes)
    assert accuracy(recipe, shuffled=True) < chance + 4 * (chance * (1 - chance) / TEST) ** 0.5
