"""Which runs a comparison of models is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ca3d.experiments.cells import Cell
from ca3d.experiments.display import Display
from ca3d.experiments.rows import Row
from ca3d.experiments.runner import RunOptions, run_cells

__all__ = ["Plan", "run_plan"]

#: Seeds of the runs that choose a learning rate: none that counts.
TUNING_SEEDS = (100, 101)


@dataclass(frozen=True)
class Plan:
    """Models x regimes x seeds on one data set.

    Args:
        data: Of every cell.
        models: Options by the name of the model; a name may have a suffix after "#", so that one
            model stands with several sets of options ("ca3d_tiny#no-attention").
        regimes: Names in `ca3d.precision`.
        seeds: The same for everything, so that differences are paired.
        recipe: Of every cell.
        own: What a model's recipe has besides, by name.
        rates: Learning rates of which each model takes the best on validation in the first regime;
            with none the recipe's is taken.
        controls: Controls in which every model is trained as well, in the first regime.

    Example:
        >>> plan = Plan({"name": "mocap30"}, {"ca3d_tiny": {}}, ["float32"], range(5), {"lr": 0.1})
        >>> len(plan.cells({}))
        5
    """

    data: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    regimes: Sequence[str]
    seeds: Sequence[int]
    recipe: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Sequence[float] = ()
    controls: Sequence[str] = ()

    def tuning(self) -> list[Cell]:
        """The runs that choose learning rates; none where there is nothing to choose."""
        if len(self.rates) < 2:
            return []
        return [
            self._cell(name, self.regimes[0], seed, None, rate, "tune")
            for name, rate, seed in itertools.product(self.models, self.rates, TUNING_SEEDS)
        ]

    def chosen(self, rows: Mapping[str, Row]) -> dict[str, float]:
        """The learning rate of each model whose tuning runs are all there.

        Args:
            rows: Rows by key.

        Returns:
            By name, the rate with the best mean validation accuracy, the first of equals.
        """
        if len(self.rates) < 2:
            rate = self.rates[0] if self.rates else self.recipe["lr"]
            return dict.fromkeys(self.models, rate)
        found: dict[str, float] = {}
        for name in self.models:
            means = {}
            for rate in self.rates:
                keys = [
                    self._cell(name, self.regimes[0], seed, None, rate, "tune").key
                    for seed in TUNING_SEEDS
                ]
                if all(key in rows for key in keys):
                    means[rate] = sum(rows[key]["val_top1"] for key in keys)
            if len(means) == len(self.rates):
                found[name] = max(means, key=lambda rate: means[rate])
        return found

    def conditions(self) -> Iterator[tuple[str, str, str | None]]:
        """Name, regime and control of everything that is compared, in the order of the report."""
        for name in self.models:
            for regime in self.regimes:
                yield name, regime, None
            for control in self.controls:
                yield name, self.regimes[0], control

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """The runs that count, all conditions of a seed before the next seed.

        Args:
            rates: Learning rate by name; models without one are left out until it is chosen.
        """
        return [
            cell
            for seed in self.seeds
            for name, regime, control in self.conditions()
            for cell in self.condition(name, regime, control, rates, [seed])
        ]

    def condition(
        self,
        name: str,
        regime: str,
        control: str | None,
        rates: Mapping[str, float],
        seeds: Sequence[int] | None = None,
    ) -> list[Cell]:
        """The runs of one condition.

        Args:
            name: One of `models`.
            regime: One of `regimes`.
            control: One of `controls`, or None.
            rates: As in `cells`.
            seeds: None for all.
        """
        rate = rates.get(name, self.recipe.get("lr") if len(self.rates) < 2 else None)
        if rate is None:
            return []
        chosen = self.seeds if seeds is None else seeds
        return [self._cell(name, regime, seed, control, rate) for seed in chosen]

    def _cell(
        self,
        name: str,
        regime: str,
        seed: int,
        control: str | None,
        rate: float,
        part: str = "main",
    ) -> Cell:
        data = dict(self.data)
        if control is not None:
            data["control"] = control
        if part == "tune":
            data["score_train"] = False
        return Cell(
            model=name.partition("#")[0],
            regime=regime,
            seed=seed,
            data=data,
            model_options=self.models[name],
            recipe={**self.recipe, **self.own.get(name, {}), "lr": rate},
            part=part,
            variant=name.partition("#")[2],
        )


def run_plan(plan: Plan, options: RunOptions, display: Display) -> dict[str, Row]:
    """Trains what is missing: first the runs that choose learning rates, then those that count.

    Args:
        plan: What to train.
        options: How.
        display: Shows the progress.

    Returns:
        The rows that are there, by key.
    """
    rows = run_cells(plan.tuning(), options, display) if plan.tuning() else {}
    return {**rows, **run_cells(plan.cells(plan.chosen(rows)), options, display)}
