"""What each regime stores, that it trains, and that nothing wider is kept than it says."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_videos import TINY, make_folder
from torch import Tensor, nn

from ca3d import models, precision, weights
from ca3d.errors import UserError
from ca3d.models.norm import BatchNorm
from ca3d.training import TrainConfig, train
from ca3d_kernels import PreParamSGD

HALF = [name for name in precision.names() if isinstance(precision.create(name), precision.Float16)]
STORED = dict.fromkeys(HALF, torch.float16)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.create("ca3d_tiny", num_classes=3, widths=(4, 4, 8, 8), frames=8, dropout=0.0)


def batch(clips: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(clips, 3, 8, 32, 32), torch.arange(clips) % 3


def step(regime: precision.Regime, model: nn.Module, optimizer: Any) -> precision.Step:
    clips, labels = batch()
    regime.backward(regime.loss(regime.forward(model, clips), labels))
    return regime.step(optimizer, list(model.parameters()))


@pytest.mark.parametrize("name", precision.names())
def test_trains_and_stores_what_it_says(name: str) -> None:
    regime = precision.create(name)
    assert regime.name == name
    model = regime.prepare(tiny()).train()
    optimizer = regime.optimizer("sgd", model.parameters(), lr=0.02)
    clips, labels = batch()
    before = float(regime.loss(regime.forward(model, clips), labels).detach())
    for _ in range(8):
        assert step(regime, model, optimizer).applied
    assert float(regime.loss(regime.forward(model, clips), labels).detach()) < before
    dtype = STORED.get(name, torch.float32)
    floating = [x for x in model.state_dict().values() if x.is_floating_point()]
    assert {x.dtype for x in floating} == {dtype}
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    assert {x.dtype for x in state} == {torch.float32 if name == "qat" else dtype}


@pytest.mark.parametrize("name", [name for name in HALF if name != "qat"])
def test_nothing_wider_than_float16_is_kept(name: str) -> None:
    regime = precision.create(name)
    model = regime.prepare(tiny()).train()
    optimizer = regime.optimizer("sgd", model.parameters(), lr=0.02)
    widths = {x.shape[0] for x in model.state_dict().values() if x.dim()} | {3}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    clips, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = regime.loss(regime.forward(model, clips), labels)
    regime.backward(loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    optimizer.step()
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    assert any(x.numel() > 1000 for x in kept)
    for x in (*kept, *gradients, *state, *model.parameters(), *model.buffers()):
        statistics = x.dim() <= 1 and x.numel() in widths
        counts = not x.is_floating_point()
        assert x.element_size() <= 2 or statistics or (counts and x.numel() <= 4), (
            x.dtype,
            x.shape,
        )
        assert not (counts and x.element_size() > 1 and x.numel() > 4)


def gradients(
    model: nn.Module, logits: Callable[[nn.Module], Tensor], labels: Tensor, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logits and all gradients of a model in training, in float64."""
    model.zero_grad()
    output = logits(model.train())
    (F.cross_entropy(output.float(), labels) * factor).backward()
    found = [p.grad.double().flatten() / factor for p in model.parameters() if p.grad is not None]
    return output.detach().double(), torch.cat(found)


def test_float16_is_as_exact_as_torch_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    regime = precision.create("float16")
    errors, torch_errors = [], []
    clips, labels = batch(96)  # fewer make the statistics of the last blocks a matter of luck
    half = clips.half()
    for seed in range(3):
        model = regime.prepare(tiny(seed))
        exact = gradients(copy.deepcopy(model).double(), lambda m: m(half.double()), labels)
        ours = gradients(copy.deepcopy(model), lambda m: regime.forward(m, half), labels, 128)
        with monkeypatch.context() as patch:
            patch.setattr(BatchNorm, "by_kernel", lambda self, x: False)
            torchs = gradients(model, lambda m: m(half), labels, 128)
        for found, result in ((errors, ours), (torch_errors, torchs)):
            found.append([(x - y).norm() / y.norm() for x, y in zip(result, exact, strict=True)])
    # Single networks differ by luck: rounding turns ReLUs on and off.
    ours, torchs = torch.tensor(errors).mean(0), torch.tensor(torch_errors).mean(0)
    assert (ours <= 2 * torchs).all()
    assert ours[0] < 0.05


@pytest.mark.parametrize("name", ["float32", "float16", "float16-published", "qat"])
def test_a_step_with_an_overflow_changes_nothing(name: str) -> None:
    regime = precision.create(name)
    model = regime.prepare(tiny()).train()
    optimizer = regime.optimizer("sgd", model.parameters(), lr=0.02)
    assert step(regime, model, optimizer).applied
    before = copy.deepcopy(model.state_dict())
    clips, labels = batch()
    regime.backward(regime.loss(regime.forward(model, clips), labels))
    next(model.parameters()).grad[0] = torch.inf
    assert not regime.step(optimizer, list(model.parameters())).applied
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key


def test_clipping_sees_the_gradients_of_the_loss() -> None:
    norms, changes = [], []
    for name in ("float32", "float16"):
        regime = precision.create(name)
        model = regime.prepare(tiny()).train()
        optimizer = regime.optimizer("sgd", model.parameters(), lr=1.0, momentum=0.0)
        before = [p.detach().double().clone() for p in model.parameters()]
        clips, labels = batch()
        regime.backward(regime.loss(regime.forward(model, clips), labels))
        norms.append(regime.step(optimizer, list(model.parameters()), clip_norm=0.1).gradient_norm)
        after = [p.detach().double() for p in model.parameters()]
        moved = [x - y for x, y in zip(after, before, strict=True)]
        changes.append(float(torch.cat([x.flatten() for x in moved]).norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert changes[0] == pytest.approx(0.1, rel=1e-3)
    assert changes[1] == pytest.approx(0.1, rel=0.1)


def test_fake_quantisation_rounds_weights_and_outputs() -> None:
    regime = precision.create("fake-quant")
    model = regime.prepare(tiny()).eval()
    clips, _ = batch()
    logits = regime.forward(model, clips)
    assert torch.equal(logits, logits.half().float())
    exact = precision.create("float32").forward(model, clips)
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0.02, atol=0.02)
    rounded = precision.simulated.rounded(torch.tensor([1.0001, 2.0], requires_grad=True))
    rounded.sum().backward()
    assert rounded.tolist() == [1.0, 2.0]


def test_float16_refuses_other_optimizers() -> None:
    with pytest.raises(ValueError, match="optimizer must be sgd with precision float16"):
        precision.create("float16").optimizer("adamw", tiny().parameters(), lr=0.1)
    with pytest.raises(UserError, match="precision 'fp8' is not known; choose from float32"):
        precision.create("fp8")


def test_inference_stores_what_training_stored() -> None:
    names = {name: type(precision.for_inference(name)).__name__ for name in precision.names()}
    assert names["float16-root"] == names["ptq-float16"] == names["qat"] == "Float16"
    assert names["fake-quant"] == "FakeQuant"
    assert names["float32"] == "Float32"


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "bars")


def run(bars: Path, out: Path, **options: Any) -> Any:
    common = {**TINY, "data": str(bars), "out": str(out), "progress": "none", "epochs": 2}
    return train(TrainConfig(**{**common, **options}))


@pytest.mark.parametrize("name", ["float16", "float16-sqr", "qat", "fake-quant", "ptq-float16"])
def test_a_run_leaves_files_of_its_dtype(name: str, bars: Path, tmp_path: Path) -> None:
    result = run(bars, tmp_path / "run", precision=name)
    assert result.skipped == 0
    dtype = torch.float32 if name == "fake-quant" else torch.float16
    tensors = load_file(tmp_path / "run" / "last.safetensors").values()
    assert {x.dtype for x in tensors if x.is_floating_point()} == {dtype}
    model, info = weights.load(tmp_path / "run" / "last.safetensors")
    assert info.precision == name
    regime = precision.for_inference(info.precision)
    clips, _ = batch()
    # The statistics of four steps are no good yet for evaluation.
    assert bool(regime.forward(regime.prepare(model).train(), clips).isfinite().all())


def test_a_run_is_not_resumed_in_another_regime(bars: Path, tmp_path: Path) -> None:
    run(bars, tmp_path / "run", precision="float16", max_steps=1)
    with pytest.raises(UserError, match="precision"):
        run(bars, tmp_path / "run", precision="qat", max_steps=1, resume="auto")


def test_state_of_another_regime_is_refused() -> None:
    states = {}
    for name in ("float16", "raw-float16"):
        regime = precision.create(name)
        model = regime.prepare(tiny()).train()
        optimizer = regime.optimizer("sgd", model.parameters(), lr=0.02)
        step(regime, model, optimizer)
        states[name] = optimizer.state_dict()
    assert isinstance(optimizer, PreParamSGD)
    with pytest.raises(ValueError, match="pre-parameters of LinearMapping"):
        optimizer.load_state_dict(states["float16"])
