"""Tables of measured results, of one protocol each."""

# `option` returns dataclasses.field(...), which is what a default should be.
# ruff: noqa: RUF009

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ca3d.errors import UserError
from ca3d.options import option

_FIGURES = ("top1", "top5", "mean_class")


@dataclass
class ResultsConfig:
    """Every option of `ca3d results`.

    Example:
        >>> ResultsConfig(["runs/split1", "runs/split2"]).format
        'markdown'
    """

    runs: list[str] = option(
        None,
        "Run folders, or folders that `ca3d eval --out` wrote",
        positional=True,
        count="*",
        factory=list,
    )
    format: Literal["markdown", "csv", "json"] = option("markdown", "Form of the table")


def read(path: str | Path) -> dict[str, Any]:
    """Reads the test figures of a run.

    Args:
        path: A run folder, a folder that `ca3d eval --out` wrote, or a results.json.

    Raises:
        ca3d.errors.UserError: There are none.

    Example:
        >>> read("missing")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing: no results.json in it or in its folder test
    """
    path = Path(path)
    for file in (path / "test" / "results.json", path / "results.json", path):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file}: not JSON: {error}") from error
            if not isinstance(content, dict) or "top1" not in content:
                raise UserError(f"{file}: holds no results of ca3d")
            return {**content, "source": str(path)}
    raise UserError(f"{path}: no results.json in it or in its folder test")


def check_comparable(results: Sequence[Mapping[str, Any]]) -> None:
    """Checks that results may stand in one table: one data set, one protocol, one kind of views.

    Splits of one protocol may differ. Clips of one recording lie on both sides of a random split,
    so its figures are no match for those of an official one.

    Args:
        results: What `read` returned, or any mappings with the keys `protocol`, `split`, `clips`
            and `crops`.

    Raises:
        ca3d.errors.UserError: They differ; the message names two that do.

    Example:
        >>> official = {"protocol": {"name": "official", "dataset": "ucf101"}}
        >>> published = {"protocol": {"name": "published", "dataset": "ucf101"}}
        >>> check_comparable([official, published])
        Traceback (most recent call last):
        ca3d.errors.UserError: results can't share a table: protocol is official in one and \
published in another
    """

    def identity(result: Mapping[str, Any]) -> dict[str, Any]:
        protocol = result.get("protocol") or {}
        return {
            "protocol": protocol.get("name", "unknown"),
            "data set": protocol.get("dataset", "unknown"),
            "split": result.get("split", "test"),
            "clips": result.get("clips", 1),
            "crops": result.get("crops", 1),
        }

    if not results:
        return
    first = identity(results[0])
    for result in results[1:]:
        for name, value in identity(result).items():
            if value != first[name]:
                one = results[0].get("source", "one")
                other = result.get("source", "another")
                raise UserError(
                    f"results can't share a table: {name} is {first[name]} in {one} and {value} in"
                    f" {other}"
                )


def table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Makes the rows of a table, with the mean over the official splits where all are there.

    Args:
        results: What `read` returned.

    Returns:
        A row a result and, for each model, precision and seed with the splits 1, 2 and 3, one more
        with their plain mean, as is usual for UCF101 and HMDB51. Figures are shares of 1.

    Raises:
        ca3d.errors.UserError: The results don't belong into one table, or a split is there twice.
    """
    check_comparable(results)
    rows = []
    for result in results:
        protocol = result.get("protocol") or {}
        rows.append(
            {
                "protocol": protocol.get("name", "unknown"),
                "data set": protocol.get("dataset", "unknown"),
                "split": protocol.get("fold"),
                "model": result.get("model", ""),
                "precision": result.get("precision", ""),
                "seed": result.get("seed"),
                "views": f"{result.get('clips', 1)}x{result.get('crops', 1)}",
                "videos": result["videos"],
                "left out": len(result.get("broken", [])) + (result.get("missing") or 0),
                **{name: result[name] for name in _FIGURES},
            }
        )
    return [*rows, *_means(rows)]


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["split"] is None:
            continue
        splits = groups.setdefault((row["model"], row["precision"], row["seed"]), {})
        if row["split"] in splits:
            raise UserError(
                f"split {row['split']} of {row['model']} in {row['precision']} is given twice"
            )
        splits[row["split"]] = row
    means = []
    for splits in groups.values():
        if set(splits) == {1, 2, 3}:
            parts = list(splits.values())
            mean = {name: sum(row[name] for row in parts) / 3 for name in _FIGURES}
            total = {name: sum(row[name] for row in parts) for name in ("videos", "left out")}
            means.append({**parts[0], "split": "mean of 3", **total, **mean})
    return means


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the rows of `table` as a Markdown table, figures in percent.

    Example:
        >>> print(as_markdown([{"model": "ca3d", "top1": 0.5}]))
        | model | top1 |
        |---|---|
        | ca3d | 50.00 % |
    """
    if not rows:
        return ""

    def cell(name: str, value: Any) -> str:
        if name in _FIGURES and value is not None:
            return f"{100 * value:.2f} %"
        return "-" if value is None else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(cell(n, v) for n, v in row.items()) + " |" for row in rows]
    return "\n".join(lines)
