import math

import pytest
import torch
import torch.nn.functional as F

from ca3d.errors import UserError
from ca3d.watch.calibrate import CalibrateResult
from ca3d.watch.calibration import Calibration, calibration_error, fit


def drawn(temperature: float, samples: int = 4000, classes: int = 5):
    """Labels that follow the softmax of logits / temperature."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    labels = torch.multinomial(F.softmax(logits / temperature, 1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize(("right", "said"), [(True, "lowest"), (False, "highest")])
def test_a_temperature_at_the_end_of_what_is_tried_is_told(right, said):
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    labels = torch.tensor([0, 1] if right else [1, 0])
    found = CalibrateResult(fit(logits, labels, "mine"), ("a", "b"), 2, 0.1, 0.1)
    assert f"(the {said} that is tried: " in str(found)
    drawn_at_one = fit(*drawn(1.0), "mine")
    assert "that is tried" not in str(CalibrateResult(drawn_at_one, tuple("abcde"), 2, 0.1, 0.1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature):
    logits, labels = drawn(temperature)
    assert fit(logits, labels).temperature == pytest.approx(temperature, rel=0.1)


def test_calibration_makes_probabilities_honest():
    logits, labels = drawn(3.0)
    calibration = fit(logits[:2000], labels[:2000])
    before = calibration_error(logits[2000:].softmax(1), labels[2000:])
    after = calibration_error(calibration.probabilities(logits[2000:]), labels[2000:])
    assert after < 0.06 < 0.2 < before


def test_calibration_error_against_its_definition():
    logits, labels = drawn(2.0, samples=300)
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for place in range(15):
        inside = (confidence >= place / 15) & (confidence < (place + 1) / 15)
        if place == 14:
            inside |= confidence >= 1
        if inside.any():
            accuracy = (predicted[inside] == labels[inside]).float().mean()
            expected += float(inside.sum() / 300 * (accuracy - confidence[inside].mean()).abs())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(calibration_error(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)))


def test_a_threshold_parts_a_class_from_the_others():
    """Class 0 is certain at 0.9 and above; between 0.6 and 0.8 it is always wrong."""
    sure = torch.tensor([0.95, 0.92, 0.90, 0.80, 0.70, 0.60])
    logits = torch.stack([sure, 1 - sure], 1).log()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    calibration = fit(logits, labels)
    p = calibration.probabilities(logits)[:, 0]
    assert p[3] < calibration.thresholds[0] < p[2]


def test_no_threshold_is_below_a_half():
    logits = torch.zeros(40, 4) + 0.01 * torch.randn(40, 4)
    assert min(fit(logits, torch.arange(40) % 4).thresholds) >= 0.5


def test_a_class_without_samples_gets_the_default():
    logits, labels = drawn(1.0, samples=200)
    labels[labels == 4] = 0
    assert fit(logits, labels).thresholds[4] == 0.5


def test_it_survives_a_weights_file():
    calibration = Calibration(1.7, (0.5, 0.75), "bars, val")
    assert Calibration.of_extra(calibration.to_extra(), 2) == calibration
    assert Calibration.of_extra({}, 2) == Calibration.default(2)


@pytest.mark.parametrize(
    "stored",
    [
        {"temperature": 0.0, "thresholds": [0.5, 0.5]},
        {"temperature": "hot", "thresholds": [0.5, 0.5]},
        {"temperature": 1.0, "thresholds": [0.5, 1.5]},
        {"temperature": 1.0, "thresholds": [0.5]},
        {"temperature": 1.0},
    ],
)
def test_a_damaged_calibration_is_named(stored):
    with pytest.raises(UserError, match="calibration"):
        Calibration.of_extra({"calibration": stored}, 2)


@pytest.mark.parametrize(("logits", "labels"), [((0, 2), 0), ((3, 2), 2), ((3,), 3)])
def test_shapes(logits, labels):
    with pytest.raises(ValueError, match="logits must be"):
        fit(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
