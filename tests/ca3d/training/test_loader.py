import os

import pytest
import torch
from torch import Tensor

from ca3d.errors import UserError
from ca3d.training.loader import epoch_batches, load_batches


class Numbers:
    """Clip i holds i and the epoch; 3 is unreadable, 5 has no clip."""

    def __init__(self) -> None:
        self.classes = ["even", "odd"]
        self.epoch = -1

    def __len__(self) -> int:
        return 8

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | None:
        if index == 3:
            raise UserError("3.avi: broken")
        if index == 5:
            return None
        return torch.full((1,), 100.0 * self.epoch + index), index % 2, index


def test_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = epoch_batches(23, 5, seed=7, epoch=2)
    torch.manual_seed(2)
    assert first == epoch_batches(23, 5, seed=7, epoch=2)
    assert sorted(place for batch in first for place in batch) == list(range(23))
    assert first != epoch_batches(23, 5, seed=7, epoch=3)
    assert first != epoch_batches(23, 5, seed=8, epoch=2)


def test_last_batch_of_one_is_dropped() -> None:
    batches = epoch_batches(21, 5, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    assert epoch_batches(1, 5, seed=0, epoch=0) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_leave_the_global_generator_alone(workers: int) -> None:
    before = torch.get_rng_state()
    order = [[6, 0], [2, 3, 5], [3]]
    batches = list(load_batches(Numbers(), order, epoch=4, workers=workers))
    assert torch.equal(before, torch.get_rng_state())
    assert [batch.indices.tolist() for batch in batches] == [[6, 0], [2], []]
    assert batches[0].clips.flatten().tolist() == [406.0, 400.0]
    assert batches[0].labels.tolist() == [0, 0]
    assert [batch.broken for batch in batches] == [[], ["3.avi: broken"], ["3.avi: broken"]]
    assert [len(batch) for batch in batches] == [2, 1, 0]


class Niceness(Numbers):
    """Every clip holds the niceness of the process that reads it."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return torch.full((1,), float(os.nice(0))), index % 2, index


@pytest.mark.parametrize(("workers", "more"), [(0, 0), (1, 5)])
def test_readers_leave_the_cores_to_the_process_that_trains(workers: int, more: int) -> None:
    (batch,) = load_batches(Niceness(), [[0, 1]], workers=workers)
    expected = min(os.nice(0) + more, 19)
    assert batch.clips.flatten().tolist() == [expected, expected]
