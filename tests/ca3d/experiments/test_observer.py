"""What the observer counts, against cases whose numbers are known."""

import pytest
import torch
from torch import nn

from ca3d.experiments.observer import EXPONENTS, UPDATE_EXPONENTS, Observer, Tally
from ca3d.precision import Float16, Float32


def test_tally_knows_the_borders_of_float16() -> None:
    values = [0.0, 2.0**-25, 2.0**-24, 2.0**-15, 2.0**-14, 1.0, 32768.0, 65504.0, 65520.0]
    tally = Tally()
    tally.add(torch.tensor([*values, float("inf"), float("nan")]))
    half = torch.tensor(values).half()
    assert tally.count == 11
    assert tally.zero + tally.vanish == int((half == 0).sum())
    assert tally.subnormal == 2
    assert tally.above_bound == 4
    assert tally.overflow == int((~half.isfinite()).sum()) + 2
    assert sum(tally.exponents) == 8
    assert tally.exponents[EXPONENTS.index(0)] == 1


def _train(regime: Observer, gradients: list[torch.Tensor], weight: float, lr: float) -> None:
    """Steps one weight vector with the given gradients of the loss."""
    layer = nn.Linear(len(gradients[0]), 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    model = regime.prepare(layer).train()
    sgd = regime.optimizer("sgd", model.parameters(), lr=lr, momentum=0.0)
    for gradient in gradients:
        logits = regime.forward(model, gradient[None])
        # A "loss" whose gradient is the input.
        loss = regime.loss(logits, torch.tensor([0]))
        (logits.sum() * getattr(regime.regime, "loss_factor", 1.0) + 0 * loss).backward()
        regime.step(sgd, model.parameters())


@pytest.mark.parametrize(
    ("rounding", "unchanged", "lost"), [("nearest", 2, 2), ("compensated", 2, 0)]
)
def test_updates_that_round_to_nothing(rounding: str, unchanged: int, lost: int) -> None:
    # Spacing of float16 at 1 from below is 2^-11: 2^-13 is less than half of it, 2^-10 more.
    regime = Observer(Float16(loss_factor=1.0, rounding=rounding), every=2)
    gradient = torch.tensor([2.0**-3, 2.0**-3, 1.0, 0.0])
    _train(regime, [torch.zeros(4), gradient], weight=1.0, lr=2.0**-10)
    found = regime.updates
    assert regime.steps == 1
    assert (found.count, found.unchanged, found.lost) == (3, unchanged, lost)
    # theta = 128: the updates are 128 x lr x gradient, its spacing 2^-3.
    assert found.exponents[UPDATE_EXPONENTS.index(0)] == 1
    assert found.exponents[UPDATE_EXPONENTS.index(-3)] == 2
    exact = 2 * 2.0**-12 + 2.0**6 * 2.0**-12
    assert found.intended == pytest.approx(exact)
    kept = exact if rounding == "compensated" else 2.0**6 * 2.0**-12
    assert found.realised == pytest.approx(kept)


def test_float32_loses_nothing() -> None:
    regime = Observer(Float32(), every=2)
    _train(regime, [torch.zeros(3), torch.full((3,), 2.0**-3)], weight=1.0, lr=2.0**-10)
    assert regime.updates.unchanged == 0
    assert regime.updates.realised == pytest.approx(regime.updates.intended)


def test_gradients_that_vanish_are_counted_against_float32() -> None:
    # 2^-20 times a loss factor of 2^-6 is below float16's least number.
    regime = Observer(Float16(loss_factor=2.0**-6), every=2)
    _Quadratic.check(regime)
    assert regime.tallies["gradients"].underflow == 2
    regime = Observer(Float16(loss_factor=128.0), every=2)
    _Quadratic.check(regime)
    assert regime.tallies["gradients"].underflow == 0


class _Quadratic(nn.Module):
    """Logits (0, s) with a slope of 2^-20 in two weights: the softmax halves it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        slope = (self.weight * clips[0]).sum().reshape(1, 1)
        return torch.cat([torch.zeros_like(slope), slope], 1)

    @classmethod
    def check(cls, regime: Observer) -> None:
        model = regime.prepare(cls()).train()
        sgd = regime.optimizer("sgd", model.parameters(), lr=1.0, momentum=0.0)
        for _ in range(2):
            logits = regime.forward(model, torch.full((1, 2), 2.0**-20))
            regime.backward(regime.loss(logits, torch.tensor([1])))
            assert regime.step(sgd, model.parameters()).applied


def test_observing_changes_no_bit_of_a_run() -> None:
    def trained(observed: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        regime = Observer(Float16(), every=2) if observed else Float16()
        model = regime.prepare(
            nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(128, 3))
        ).train()
        sgd = regime.optimizer("sgd", model.parameters(), lr=0.05)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            clips = torch.randn(4, 3, 4, 6, 6, generator=generator)
            logits = regime.forward(model, clips)
            regime.backward(regime.loss(logits, torch.tensor([0, 1, 2, 0])))
            regime.step(sgd, model.parameters())
        return list(model.parameters()), list(model.buffers())

    for plain, watched in zip(trained(False), trained(True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_every_must_leave_a_step_between() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Observer(Float32(), every=1)
