"""Ablations: each variant can be built for its clips, and a verdict says what the rows say."""

from pathlib import Path

import numpy as np
import pytest

from ca3d import models
from ca3d.data.embedded.recipe import Recipe
from ca3d.errors import UserError
from ca3d.experiments import claims_study
from ca3d.experiments.attention_cost import attention_cost, attention_report
from ca3d.experiments.claims_study import CLAIMS, Claim, ClaimsConfig, plan_of, verdict
from ca3d.experiments.clips import complete
from ca3d.experiments.comparison_report import Entry
from ca3d.experiments.display import Display
from ca3d.experiments.leakage import leakage_plans, leakage_report
from ca3d.experiments.plan import run_plan
from ca3d.experiments.runner import RunOptions

CLIPS = 200


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_variant_can_be_built(claim: Claim, scale: str) -> None:
    plan = plan_of(claim, ClaimsConfig(scale=scale, seeds=1))  # type: ignore[arg-type]
    data = complete(plan.data)
    options = {"size": data["size"], "frames": data["frames"]}
    counts = []
    for variant in plan.models.values():
        model = models.create_for_clips("ca3d_variant", 48, **options, **variant)
        counts.append({**model.options})
    assert all(counts[0] != other for other in counts[1:])
    recipe = Recipe(data["name"], 64, data["frames"] * data["step"], 16, 0.0, 0)
    assert recipe.frames >= recipe.least_frames


def test_claims_share_the_runs_of_the_unchanged_model() -> None:
    config = ClaimsConfig(seeds=1)
    keys = {}
    for claim in CLAIMS:
        if claim.name in ("head", "position"):
            plan = plan_of(claim, config)
            unchanged = f"ca3d_variant#{next(iter(claim.variants))}"
            keys[claim.name] = [
                c.key for c in plan.condition(unchanged, "float32", None, {unchanged: 0.1})
            ]
    assert keys["head"] == keys["position"] != []


def test_long_clips_are_long_where_attention_is_local() -> None:
    # Local attention differs from full attention only where the clip is longer than the window.
    claim = next(c for c in CLAIMS if c.name == "attention-64")
    config = ClaimsConfig()
    plan = plan_of(claim, config)
    model = models.create_for_clips("ca3d_variant", 48, frames=plan.data["frames"], size=32)
    table = model.layers["position"].weight.shape[1]
    assert table == 32 > 2 * 5


def _entries(*rights: float, seeds: int = 5) -> list[Entry]:
    found = []
    for place, right in enumerate(rights):
        rows = {}
        for seed in range(seeds):
            draws = np.random.default_rng(seed).random(CLIPS)
            correct = "".join("1" if x < right else "0" for x in draws)
            rows[seed] = {"correct": correct}
        found.append(Entry(f"ca3d_variant#{place}", "float32", None, seeds, rows))
    return found


def test_verdicts() -> None:
    better = Claim("x", "a part helps", {"a": {}, "b": {}})
    assert verdict(better, _entries(0.8, 0.5)) == "held"
    assert verdict(better, _entries(0.5, 0.8)) == "not held"
    assert verdict(better, _entries(0.5, 0.5)) == "undecided"
    assert verdict(better, _entries(0.8, 0.5, 0.8)) == "undecided"
    assert verdict(better, _entries(0.8, 0.5, seeds=4)) == "no inference"
    assert verdict(better, _entries(0.8, 0.5, seeds=0)) == "not run yet"
    as_well = Claim("x", "a part does as well", {"a": {}, "b": {}})
    assert verdict(as_well, _entries(0.5, 0.5)) == "not contradicted"
    assert verdict(as_well, _entries(0.5, 0.8)) == "not held"


def test_cost_of_attention_grows_with_the_window_and_not_with_the_clip() -> None:
    short, long = attention_cost([64, 512], rounds=1)
    assert long["local_bytes"] <= 8.1 * short["local_bytes"]
    assert "| 512 |" in "\n".join(attention_report([short, long]))


def test_leakage_is_the_same_run_on_two_divisions(tmp_path: Path) -> None:
    data = {"train": 60, "val": 30, "test": 30, "frames": 4, "step": 2}
    recipe = {"epochs": 1, "batch_size": 16, "schedule": "constant"}
    plans = leakage_plans(data, {"ca3d_tiny": {}}, {**recipe, "lr": 0.01}, range(1))
    assert "not run yet" in "\n".join(leakage_report(plans, {}))
    rows = {}
    for plan in plans.values():
        rows |= run_plan(plan, RunOptions(tmp_path), Display("none"))
    text = "\n".join(leakage_report(plans, rows))
    assert text.count("no inference") == 2
    assert all(len(set(row["groups"])) > 1 for row in rows.values())


def test_report_without_runs_says_so(tmp_path: Path) -> None:
    config = ClaimsConfig(out=str(tmp_path), only="keys,pools", only_report=True)
    text = claims_study.run(config).read_text()
    assert text.count("| not run yet |") == 2
    assert "## position" not in text
    assert "## leakage" not in text
    with pytest.raises(UserError, match="--only: 'color' is none of"):
        ClaimsConfig(only="color").validate()
