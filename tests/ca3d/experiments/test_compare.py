"""Comparisons: what they plan, that they go on, and what their reports say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ca3d import models
from ca3d.data.embedded.maker import make
from ca3d.errors import UserError
from ca3d.experiments import compare, results_study
from ca3d.experiments.compare import CompareConfig, make_plan
from ca3d.experiments.comparison_report import comparison, entries
from ca3d.experiments.plan import Plan
from ca3d.experiments.rows import Row, read_rows
from ca3d.experiments.runner import ROWS


def _fake(plan: Plan, quality: dict[str, float], groups: list[str] | None = None) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for cell in plan.cells(plan.chosen({})):
        right = round(20 * quality.get(cell.data.get("control") or cell.model, 0.5))
        rows[cell.key] = {
            "key": cell.key,
            "cell": cell.to_dict(),
            "correct": "1" * right + "0" * (20 - right),
            "classes": 4,
            "parameters": 1234,
            "skipped": 0,
            "steps": 1,
            "best_epoch": 0,
            "cpu_seconds": 1.0,
            "train_top1": 1.0,
            "val_top1": 0.5,
            "test_top1": right / 20,
            **({"groups": groups} if groups else {}),
        }
    return rows


def _plan(seeds: int = 5, **values: object) -> Plan:
    fields = {
        "data": {"name": "motion-order"},
        "models": {"ca3d_tiny": {}, "r3d_tiny": {}},
        "regimes": ["float32", "float16"],
        "seeds": range(seeds),
        "recipe": {"lr": 0.1},
    }
    return Plan(**{**fields, **values})  # type: ignore[arg-type]


def test_report_has_both_intervals_and_corrected_differences() -> None:
    plan = _plan(controls=["shuffled"])
    rows = _fake(plan, {"ca3d_tiny": 0.8, "r3d_tiny": 0.5, "shuffled": 0.25})
    text = "\n".join(comparison(entries(plan, rows)))
    assert "Not run yet" not in text
    line = next(x for x in text.splitlines() if x.startswith("| r3d_tiny, float32"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:5] == ["1,234", "5", "100.0", "50.0"]
    assert cells[5] == "50.0 [28.1, 71.9]"  # 0.5 +- 1.96 sqrt(0.25 / 20)
    assert cells[7].startswith("-30.0 [")
    assert cells[8] == "< 0.001"
    assert "frames shuffled" in text
    assert "corrected by Holm over the 5 comparisons" in text


def test_fewer_than_five_seeds_infer_nothing() -> None:
    plan = _plan(seeds=2)
    text = "\n".join(comparison(entries(plan, _fake(plan, {}))))
    assert "no inference" in text
    rows = _fake(_plan(seeds=1), {})
    text = "\n".join(comparison(entries(plan, rows)))
    assert "**Not run yet**: ca3d_tiny, float32 (1 of 2 seeds)" in text


def test_groups_of_the_test_clips_widen_the_interval() -> None:
    plan = _plan()
    quality = {"ca3d_tiny": 0.5}
    alone = entries(plan, _fake(plan, quality))
    grouped = entries(plan, _fake(plan, quality, ["a"] * 10 + ["b"] * 10))
    assert grouped[0].groups == ["a"] * 10 + ["b"] * 10
    assert comparison(alone) != comparison(grouped)


def test_learning_rate_is_chosen_per_model_on_other_seeds() -> None:
    plan = _plan(rates=(0.01, 0.1))
    cells = plan.tuning()
    assert len(cells) == 2 * 2 * 2
    assert not {cell.seed for cell in cells} & set(plan.seeds)
    best = {"ca3d_tiny": 0.01, "r3d_tiny": 0.1}
    rows = {c.key: {"val_top1": float(best[c.model] == c.recipe["lr"])} for c in cells}
    assert plan.chosen(rows) == best
    assert {(c.model, c.recipe["lr"]) for c in plan.cells(best)} == set(best.items())
    assert plan.chosen({}) == {}
    assert plan.cells({}) == []


@pytest.mark.parametrize("preset", ["table1a", "table1b", "table2"])
def test_presets_are_the_published_recipe(preset: str) -> None:
    plan = make_plan(CompareConfig(data="videos", preset=preset, seeds=1))  # type: ignore[arg-type]
    assert plan.regimes == ["float32", "qat", "float16-published"]
    assert plan.models["ca3d"] == {"preset": "published"}
    assert plan.models["r3d_18"] == {}
    assert set(plan.models) <= set(models.names())
    assert plan.recipe["protocol"] == "published"
    assert (plan.recipe["batch_size"], plan.recipe["schedule"]) == (20, "published")
    decay = {name: own["weight_decay"] for name, own in plan.own.items()}
    if preset == "table2":
        assert set(decay.values()) == {5e-5}
        assert plan.recipe["epochs"] == 120
        assert plan.recipe["milestones"] == [70, 75, 80, 85, 90, 95, 100, 105, 110, 115]
    else:
        assert (decay["ca3d"], decay["i3d"], decay["timesformer_b"]) == (5e-3, 5e-4, 5e-4)
        assert plan.recipe["milestones"] == [25, 30, 35, 40, 45]


def test_preset_can_be_cut_down_but_not_changed() -> None:
    plan = make_plan(CompareConfig(data="v", preset="table1a", models="ca3d", regimes="qat"))
    assert (list(plan.models), plan.regimes) == (["ca3d"], ["qat"])
    with pytest.raises(UserError, match="--epochs 3: --preset table1a has 50"):
        make_plan(CompareConfig(data="v", preset="table1a", epochs=3))
    with pytest.raises(UserError, match="is about videos, not about mocap30"):
        make_plan(CompareConfig(data="mocap30", preset="table1a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "DATA must name"),
        ({"models": "ca4d"}, "--models: 'ca4d' is none of"),
        ({"rates": [0.1, -1.0]}, "--rates must be finite and above 0, not -1.0"),
        ({"models": ","}, "--models must name at least 1 of ca3d, .*, not ','"),
        ({"regimes": "float8"}, "--regimes: 'float8' is none of"),
        ({"controls": "frames"}, "is not held in memory"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"reference": "i3d"}, "--reference i3d is not among"),
    ],
)
def test_bad_options(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        compare.run(
            CompareConfig(
                **{"data": "videos", "out": str(tmp_path), "only_report": True, **options}
            )
        )


def test_videos_are_compared_and_nothing_runs_twice(tmp_path: Path) -> None:
    clips = {"train": 16, "val": 8, "test": 8}
    make("motion-order", tmp_path / "v", size=clips, workers=1, resolution=32, frames=16)
    config = CompareConfig(
        data=str(tmp_path / "v"),
        models="ca3d_tiny",
        regimes="float32,float16",
        seeds=1,
        out=str(tmp_path / "c"),
        frames=4,
        stride=4,
        size=32,
        epochs=1,
        batch_size=8,
        progress="none",
    )
    report = compare.run(config).read_text()
    rows = read_rows(tmp_path / "c" / ROWS)
    dates = sorted({row["date"] for row in rows.values()})
    assert f"from runs of {' to '.join(dates)}: 2 of 2 runs" in report
    assert all(len(row["correct"]) == 8 for row in rows.values())
    assert all(0 <= row["train_top1"] <= 1 for row in rows.values())
    for row in rows.values():
        # The exact files of a run are kept with it.
        assert (tmp_path / "c" / "runs" / row["key"] / "splits" / "test.csv").is_file()
    before = (tmp_path / "c" / ROWS).read_text()
    compare.run(config)
    assert (tmp_path / "c" / ROWS).read_text() == before
    assert (tmp_path / "c" / "accuracy.png").is_file()
    assert (tmp_path / "c" / "runs.csv").read_text().count("\n") == 3


def test_nothing_is_overwritten_by_an_empty_report(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    config = CompareConfig(data="motion-order", models="r3d_tiny", out=str(tmp_path))
    with pytest.raises(UserError, match=r"report.md is of no comparison: choose another --out"):
        compare.run(config)
    plan = make_plan(replace(config, models="ca3d_tiny", regimes="float32"))
    (tmp_path / ROWS).write_text("".join(f"{json.dumps(r)}\n" for r in _fake(plan, {}).values()))
    with pytest.raises(UserError, match="has 5 runs, but none of this comparison"):
        compare.run(replace(config, only_report=True))
    assert (tmp_path / "report.md").read_text() == "mine"


def test_repeated_words_and_rates_count_once() -> None:
    plan = make_plan(
        CompareConfig(data="v", models="ca3d,ca3d", regimes="qat,qat", rates=[0.1, 0.1])
    )
    assert (list(plan.models), plan.regimes, list(plan.rates)) == (["ca3d"], ["qat"], [0.1])
    assert plan.tuning() == []


def test_data_that_changed_between_runs_is_not_compared(tmp_path: Path) -> None:
    clips = {"train": 8, "val": 8, "test": 8}
    make("motion-order", tmp_path / "v", size=clips, workers=1, resolution=32, frames=16)
    config = CompareConfig(
        data=str(tmp_path / "v"),
        models="ca3d_tiny",
        regimes="float32",
        seeds=1,
        out=str(tmp_path / "c"),
        frames=4,
        stride=4,
        size=32,
        epochs=1,
        batch_size=8,
        progress="none",
    )
    compare.run(config)
    before = (tmp_path / "c" / ROWS).read_text()
    names = (tmp_path / "v" / "test.csv").read_text().splitlines()
    assert "- 8 test clips of 8 classes.\n" in (tmp_path / "c" / "report.md").read_text()
    (tmp_path / "v" / "test.csv").write_text("\n".join(names[:-1]) + "\n")
    with pytest.raises(UserError, match=r"changed between two runs .*: 8 test clips, .*: 7, not"):
        compare.run(replace(config, seeds=2))
    assert (tmp_path / "c" / ROWS).read_text() == before


def test_results_study_plans_equal_treatment() -> None:
    config = results_study.ResultsStudyConfig()
    todo = results_study.plans(config)
    assert list(todo) == ["motion-order", "mocap30"]
    for plan in todo.values():
        cells = plan.cells(dict.fromkeys(plan.models, 0.1))
        # 3 regimes and 2 controls, 5 models, 5 seeds.
        assert len(cells) == 5 * 5 * 5
        assert len(plan.tuning()) == 5 * 3 * 2
        for cell in cells:
            assert cell.data.get("control") is None or cell.regime == "float32"
    with pytest.raises(UserError, match="--datasets: 'ucf101' is none of"):
        results_study.ResultsStudyConfig(datasets="ucf101").validate()
