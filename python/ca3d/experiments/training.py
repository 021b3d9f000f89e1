"""Training one cell of a grid with the package's own trainer."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ca3d import precision, weights
from ca3d.errors import UserError
from ca3d.experiments import clips
from ca3d.experiments.cells import Cell
from ca3d.experiments.native_float16 import NativeFloat16
from ca3d.experiments.observer import Observer
from ca3d.experiments.rows import Row, today
from ca3d.training import TrainConfig
from ca3d.training.datasets import Data, prepare_data
from ca3d.training.device import choose_device
from ca3d.training.distributed import World
from ca3d.training.loader import ClipDataset
from ca3d.training.loop import Trainer
from ca3d.training.progress import Reporter
from ca3d.training.run_folder import RunFolder
from ca3d.training.scoring import Scores, score
from ca3d.training.state import TrainResult

__all__ = ["create_regime", "train_cell"]

# A run that keeps overflowing is a result: it is not stopped, its skipped steps are counted.
_ENDURE = 10**9


def train_cell(
    cell: Cell,
    folder: Path,
    *,
    keep: bool = False,
    device: str = "auto",
    say: clips.Say = clips.silent,
) -> Row:
    """Trains a cell and tests the weights of its best validation epoch.

    Args:
        cell: What to train.
        folder: Of the grid: rendered clips are kept in it, and with `keep` the run folders.
        keep: Whether the run leaves a run folder, from which it goes on when it was stopped. Runs
            of seconds don't: they begin again.
        device: As `ca3d train --device`.
        say: Shows a line to the user.

    Returns:
        A row: the cell, accuracies of the three splits in [0, 1], which test clips were right
        ("1") and wrong ("0"), their groups where known, for videos a digest of their names, steps
        taken and skipped, seconds of computing, the date, and what `ca3d.experiments.observer`
        counted.

    Raises:
        ca3d.errors.UserError: The model, the data or an option can't be used.
        ca3d.training.interrupt.StoppedError: SIGINT or SIGTERM came.

    Example:
        >>> data = {"name": "motion-order", "train": 8, "val": 8, "test": 8, "frames": 4, "step": 4}
        >>> recipe = {"epochs": 1, "batch_size": 4, "schedule": "constant"}
        >>> row = train_cell(Cell("ca3d_tiny", "float32", 0, data, recipe=recipe), scratch)
        >>> row["steps"], len(row["correct"])
        (2, 8)
    """
    began, began_wall = time.process_time(), time.monotonic()
    regime = create_regime(cell)
    if cell.observe:
        regime = Observer(regime, cell.observe)
    with ExitStack() as stack:
        path = folder / "runs" / cell.key
        if not keep:
            # In memory where there is such a file system: nothing of it is needed later.
            root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=root))) / "run"
        config = _config(cell, path, device)
        run = stack.enter_context(RunFolder(path, resume=True))
        state = _resume_state(run, config)
        data = _data(cell, config, folder, path, say)
        trainer = _CellTrainer(config, data, regime, choose_device(device), run, Reporter())
        trainer.score_train = cell.data.get("score_train", True)
        result = trainer.run(state)
        scores = trainer.scores
    test = scores["test"]
    groups = [data.test.samples[i].group for i in test.indices.tolist()] if data.test else []
    row: Row = {
        "key": cell.key,
        "cell": cell.to_dict(),
        "steps": result.steps,
        "skipped": result.skipped,
        "best_epoch": result.best_epoch,
        "train_top1": scores["train"].metrics.top1 if "train" in scores else None,
        "val_top1": result.best_accuracy,
        "test_top1": test.metrics.top1,
        "classes": len(data.classes),
        "clips": {name: 0 if part is None else len(part) for name, part in _splits(data).items()},
        "correct": _correct(test),
        "unscored": int(test.metrics.unscored.sum()),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "cpu_seconds": round(time.process_time() - began, 2),
        "seconds": round(time.monotonic() - began_wall, 2),
        "date": today(),
    }
    if any(group is not None for group in groups):
        row["groups"] = groups
    if "folder" in cell.data and data.test:
        row["missing"], row["unreadable"] = data.missing, len(test.broken)
        row["test_clips"] = _digest([data.test.samples[i].path for i in test.indices.tolist()])
    if isinstance(regime, Observer):
        row["observed"] = regime.to_dict()
    return row


def create_regime(cell: Cell) -> precision.Regime:
    """Makes the regime of a cell.

    Args:
        cell: Its regime is one of `ca3d.precision` or "native-float16".

    Raises:
        ca3d.errors.UserError: It is not.

    Example:
        >>> create_regime(Cell("m", "float16", 0, {}, regime_options={"rounding": "stochastic"}))
        Float16()
    """
    if cell.regime == NativeFloat16.name:
        return NativeFloat16(**cell.regime_options)
    return precision.create(cell.regime, **cell.regime_options)


class _CellTrainer(Trainer):
    """The trainer without pictures; afterwards it scores the train split too."""

    scores: dict[str, Scores]
    score_train = True

    def _draw_curves(self) -> None:
        pass

    def _finish(self) -> TrainResult:
        at, path = self.progress, self.folder.path
        model, _ = weights.load(path / "best.safetensors", device=str(self.device))
        splits: dict[str, ClipDataset | None] = {"test": self.data.test}
        if self.score_train:
            # As the others are seen: central clips, nothing drawn.
            train: Any = copy.copy(self.data.train)
            train.training = False
            splits["train"] = train
        self.scores = {
            name: score(
                model,
                self.regime,
                split,
                len(self.data.classes),
                batch_size=self.config.batch_size,
                workers=self.workers,
                device=self.device,
            )
            for name, split in splits.items()
            if split is not None
        }
        return TrainResult(path, at.best_epoch, at.best_accuracy, None, at.steps, at.skipped)


def _config(cell: Cell, path: Path, device: str) -> TrainConfig:
    known = {field.name for field in fields(TrainConfig)}
    unknown = sorted(set(cell.recipe) - known)
    if unknown:
        raise UserError(f"the recipe has no {unknown[0]!r}")
    values: dict[str, Any] = {"workers": 0, "checkpoint_steps": 0}
    if "folder" in cell.data:
        values |= {key: value for key, value in cell.data.items() if key in known}
        values |= {"data": cell.data["folder"], "workers": None, "checkpoint_steps": 200}
    else:
        filled = clips.complete(cell.data)
        values |= {"data": cell.data["name"], "stride": filled["step"]}
        values |= {"frames": filled["frames"], "size": filled["size"]}
    regime = {"precision": cell.regime, "precision_options": dict(cell.regime_options)}
    config = TrainConfig(
        **{
            **values,
            "out": str(path),
            "model": cell.model,
            "model_options": dict(cell.model_options),
            "seed": cell.seed,
            "device": device,
            "resume": "auto",
            "progress": "none",
            "max_skipped": _ENDURE,
            **regime,
            **cell.recipe,
        }
    )
    config.validate()
    return config


def _resume_state(run: RunFolder, config: TrainConfig) -> dict[str, Any] | None:
    from ca3d.training.checkpoint import load_resume_state

    if not run.has_resume_state:
        return None
    state = load_resume_state(run.resume_file)
    run.check_same(state["config"], config.to_dict(), state.get("processes", 1), World())
    return state


def _data(cell: Cell, config: TrainConfig, folder: Path, path: Path, say: clips.Say) -> Data:
    if "folder" in cell.data:
        return prepare_data(config, path, clips.silent)
    return clips.load(cell.data, folder / "clips", cell.seed, say)


def _splits(data: Data) -> dict[str, ClipDataset | None]:
    return {"train": data.train, "val": data.val, "test": data.test}


def _digest(paths: list[Path]) -> str:
    names = "\n".join(sorted(f"{path.parent.name}/{path.name}" for path in paths))
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _correct(scores: Scores) -> str:
    # A clip whose scores are not finite has no likeliest class, though argmax names one.
    scored = scores.probabilities.isfinite().all(1)
    right = scored & (scores.probabilities.argmax(1) == scores.labels)
    order = torch.argsort(scores.indices)
    return "".join("1" if r else "0" for r in right[order].tolist())
