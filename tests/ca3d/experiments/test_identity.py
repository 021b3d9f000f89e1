"""In exact arithmetic the linear map is plain SGD, and with c = 128 it is plain float16 SGD."""

import pytest
import torch
from torch import nn

from ca3d.precision import Float16
from ca3d_kernels import LinearMapping, PreParamSGD

RATE, MOMENTUM, DECAY = 0.05, 0.9, 5e-3
SMALLEST = torch.finfo(torch.float16).smallest_normal


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, stride=(1, 2, 2)),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, stride=(1, 2, 2)),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    clips = torch.randn(8, 3, 6, 12, 12, generator=generator)
    return clips, torch.randint(0, 4, (8,), generator=generator)


def test_trained_network_is_bitwise_plain_float16_sgd() -> None:
    # Every step of a training run is compared with plain float16 SGD (stored in float16, computed
    # in float32) from the same state: w, momentum / 128 and the gradient that arrived. Where a
    # value of plain SGD is subnormal the map keeps digits that it has not: those are left out.
    torch.manual_seed(0)
    regime = Float16()
    model = regime.prepare(_network())
    parameters = list(model.parameters())
    sgd = regime.optimizer("sgd", parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    left_out = total = 0
    for step in range(12):
        clips, labels = _batch(step)
        regime.backward(regime.loss(regime.forward(model, clips), labels))
        plain = []
        for p in parameters:
            w, g = p.detach().float(), p.grad.float() / regime.loss_factor
            d = g + DECAY * w
            state = sgd.state.get(p)
            m = d if not state else MOMENTUM * (state["momentum_buffer"].float() / 128) + d
            plain.append(((w - RATE * m).half(), m.half(), w.abs() >= SMALLEST))
        assert regime.step(sgd, parameters).applied
        for p, (w, m, was_normal) in zip(parameters, plain, strict=True):
            normal = was_normal & (w.abs() >= SMALLEST) & (m.abs() >= SMALLEST)
            left_out, total = left_out + int((~normal).sum()), total + normal.numel()
            assert torch.equal(p.detach()[normal], w[normal])
            assert torch.equal(sgd.state[p]["momentum_buffer"][normal], (m * 128)[normal])
            assert torch.equal(sgd.state[p]["pre_parameter"][normal], (w * 128)[normal])
    assert left_out < 0.1 * total


@pytest.mark.parametrize("constant", [100.0, 128.0])
def test_in_float64_the_linear_map_is_plain_sgd(constant: float) -> None:
    torch.manual_seed(0)
    ours, plain = _network().double(), _network().double()
    plain.load_state_dict(ours.state_dict())
    options = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    mapped = PreParamSGD(ours.parameters(), mapping=LinearMapping(constant), **options)
    sgd = torch.optim.SGD(plain.parameters(), **options)
    for step in range(12):
        clips, labels = _batch(step)
        for model, optimizer in ((ours, mapped), (plain, sgd)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(clips.double()), labels).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_another_constant_is_not_plain_float16_sgd() -> None:
    # What makes 128 special is that it is a power of two.
    w = torch.linspace(0.5, 1.0, 1000).half()
    param = nn.Parameter(w.clone())
    optimizer = PreParamSGD([param], lr=0.0, mapping=LinearMapping(100.0))
    param.grad = torch.zeros_like(w)
    optimizer.step()
    assert not torch.equal(param.detach(), w)
