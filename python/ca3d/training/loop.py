"""The training loop."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ca3d import models, precision, weights
from ca3d.errors import UserError
from ca3d.evaluate import EvalResult, weights_file
from ca3d.models.sync_norm import synchronise
from ca3d.training import checkpoint, fine_tuning, plots
from ca3d.training.config import TrainConfig
from ca3d.training.datasets import Data, prepare_data
from ca3d.training.device import choose_device
from ca3d.training.distributed import World, connect
from ca3d.training.interrupt import SignalGuard, StoppedError
from ca3d.training.loader import default_workers, epoch_batches, load_batches
from ca3d.training.logs import MetricsLog, Row, summary_writer
from ca3d.training.progress import Reporter, Status, create
from ca3d.training.run_folder import RunFolder
from ca3d.training.schedule import Schedule
from ca3d.training.scoring import Scores, merge, score
from ca3d.training.state import Progress, TrainResult
from ca3d.training.step import Stepper, smallest_share, training_batches


def train(config: TrainConfig) -> TrainResult:
    """Trains a model as `config` says and leaves everything in the run folder.

    Args:
        config: The options; see `TrainConfig`.

    Returns:
        Best validation accuracy and test figures.

    Raises:
        ca3d.errors.UserError: An option, the data or the run folder is not as it must be, or too
            many steps in a row were not finite.
        ca3d.training.interrupt.StoppedError: SIGINT or SIGTERM came; the state is saved.

    Example:
        >>> train(TrainConfig(data="videos", out="run", lr=-1.0))
        Traceback (most recent call last):
        ca3d.errors.UserError: --lr must be a finite number above 0, not -1.0
    """
    config.validate()
    # Before the data is measured, which takes its time.
    try:
        models.registry.check_name(config.model)
    except ValueError as error:
        raise UserError(f"--model {config.model}: {error}") from error
    if config.tensorboard:
        summary_writer()
    if config.init_from is not None:
        weights_file(config.init_from)
    if config.freeze is not None:
        with torch.device("meta"):
            fine_tuning.freeze(_create_model(config, num_classes=2), config.freeze)
    regime = precision.create(config.precision, **config.precision_options)
    device = choose_device(config.device)
    if regime.compact:
        precision.return_freed_memory()
    if not config.out:
        raise UserError("--out must name a folder for the run")
    with connect(device, ordered=config.deterministic) as world, contextlib.ExitStack() as stack:

        def enter() -> RunFolder:
            return stack.enter_context(RunFolder(config.out, config.resume == "auto"))

        folder = world.first(enter) or RunFolder(config.out, resume=True, writes=False)
        progress = config.progress if world.is_first else "none"
        reporter = stack.enter_context(create(progress, config.log_steps))
        state = None
        if folder.has_resume_state:
            state = checkpoint.load_resume_state(folder.resume_file)
            folder.check_same(state["config"], config.to_dict(), state.get("processes", 1), world)
        elif folder.has_run:
            reporter.message(f"no {folder.resume_file}: the training begins anew")

        def prepare() -> Data:
            return prepare_data(config, folder.path, reporter.message)

        data = world.first(prepare) or prepare_data(
            config, folder.path, reporter.message, saved=True
        )
        trainer = Trainer(config, data, regime, device, folder, reporter, world)
        if state is None and world.is_first:
            folder.write_config(config.to_dict())
        return trainer.run(state)


def _create_model(config: TrainConfig, num_classes: int) -> nn.Module:
    try:
        return models.create_for_clips(
            config.model,
            num_classes=num_classes,
            **{"frames": config.frames, "size": config.size, **config.model_options},
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--model {config.model}: {error}") from error


class Trainer:
    """Trains one model on prepared data.

    Args:
        config: The options.
        data: The three splits and what is known about them.
        regime: The precision.
        device: Where to compute.
        folder: The run folder.
        reporter: Shows the progress.
        world: The processes of the run, of which the first one writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        regime: precision.Regime,
        device: torch.device,
        folder: RunFolder,
        reporter: Reporter,
        world: World | None = None,
    ) -> None:
        world = self.world = world or World()
        self.config, self.data, self.regime, self.device = config, data, regime, device
        self.folder, self.reporter = folder, reporter
        self.workers = default_workers() if config.workers is None else config.workers
        self.progress = Progress()
        self.guard = SignalGuard()
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        torch.manual_seed(config.seed)
        self.model = self._make_model()
        decay = config.weight_decay
        self.optimizer = regime.optimizer(
            config.optimizer,
            models.decay_groups(self.model),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=models.recipe(config.model).weight_decay if decay is None else decay,
        )
        if config.early_stopping is not None and data.val is None:
            raise UserError("--early-stopping needs a validation split, and there is none")
        least = smallest_share(config, world) * world.size
        if config.batch_size < least:
            raise UserError(
                f"--batch-size {config.batch_size} is that of all {world.size} processes together;"
                f" it must be at least {least}"
            )
        batches = self._batches(0)
        if not batches:
            raise UserError(
                f"{config.data}: {len(data.train)} training videos are too few; BatchNorm needs"
                f" {least}"
            )
        self.batches_per_epoch = len(batches)
        steps = math.ceil(len(batches) / config.accumulate)
        self.epochs = config.epochs
        if config.max_steps is not None:
            self.epochs = min(config.epochs, math.ceil(config.max_steps / steps))
        total = min(config.epochs * steps, config.max_steps or math.inf)
        self.schedule = Schedule(
            config.schedule,
            config.epochs,
            steps,
            config.warmup_epochs,
            config.milestones,
            total_steps=int(total),
        )
        if world.size > 1 and config.sync_bn:
            synchronise(self.model)
        elif config.sync_bn:
            reporter.message("--sync-bn is not used: this is the only process")
        clips = torch.zeros(2, 3, config.frames, config.size, config.size, device=device)
        self.network = world.wrap(self.model, lambda model: regime.forward(model, clips))
        if world.rank:
            # Dropout draws differ from process to process.
            torch.manual_seed(config.seed + 1_000_003 * world.rank)
        self.stepper = Stepper(
            config,
            self.model,
            self.network,
            regime,
            self.optimizer,
            device,
            world,
            self.guard,
            reporter,
            self._class_weights(),
        )
        self.log = MetricsLog(folder.path, tensorboard=config.tensorboard and world.is_first)
        self._speed = 0.0
        self._drawn = time.monotonic()

    def run(self, state: dict[str, Any] | None = None) -> TrainResult:
        """Trains from the start or from a resume state, then reads the test split once.

        Args:
            state: What a resume file held.

        Returns:
            The result.
        """
        if state is not None:
            self._restore(state)
        if self.progress.finished:
            self.reporter.message(
                f"{self.folder.path}: this run is finished; nothing is trained any more"
            )
        else:
            title = (
                f"{self.config.model}: {sum(p.numel() for p in self.model.parameters()):,}"
                f" parameters, {self.regime.name} on {self.device}"
                f"{f' in {self.world.size} processes' if self.world.size > 1 else ''},"
                f" {len(self.data.train)} training and {len(self.data.val or [])} validation videos"
                f" in {len(self.data.classes)} classes"
            )
            with self.guard:
                self.reporter.start(title, self._status())
                if state is not None:
                    at = self.progress
                    self.reporter.message(f"resumed at epoch {at.epoch + 1}, batch {at.batch}")
                while not self.progress.finished:
                    self._train_epoch()
                    self._end_epoch()
        self.reporter.stop()
        self.log.close()
        return self._finish()

    def _make_model(self) -> nn.Module:
        config, data = self.config, self.data
        model = _create_model(config, len(data.classes))
        if config.init_from is not None:
            report = fine_tuning.initialize_from(
                model, data.classes, config.init_from, data.clip_info()
            )
            self.reporter.message(f"starting from {config.init_from}")
            for line in report:
                self.reporter.message(f"  {line}")
        model = self.regime.prepare(model.to(self.device))
        if config.freeze is not None:
            frozen = fine_tuning.freeze(model, config.freeze)
            self.reporter.message(f"{len(frozen)} parameters frozen by --freeze")
        return model

    def _class_weights(self) -> Tensor | None:
        if self.config.class_weights == "none":
            return None
        counts = torch.bincount(
            torch.tensor(self.data.train_labels), minlength=len(self.data.classes)
        ).clamp(min=1)
        return (counts.sum() / (len(counts) * counts)).float().to(self.device)

    def _train_epoch(self) -> None:
        config, at = self.config, self.progress
        self.model.train()
        if config.freeze_bn:
            fine_tuning.set_batch_norm_frozen(self.model)
        batches = self._batches(at.epoch)
        stream = load_batches(
            self.data.train,
            [self.world.share(batch) for batch in batches[at.batch :]],
            epoch=at.epoch,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        begin = time.perf_counter()
        try:
            while at.batch < len(batches) and not self._enough_steps():
                first = at.batch
                last = min(first + config.accumulate, len(batches))
                clips = sum(map(len, batches[first:last]))
                rate = config.lr * self.schedule.factor(at.epoch, first // config.accumulate)
                self.stepper.take(stream, last - first, clips, rate, at)
                at.batch = last
                begin = self._after_step(begin, clips)
        finally:
            stream.close()

    def _batches(self, epoch: int) -> list[list[int]]:
        config = self.config
        batches = epoch_batches(len(self.data.train), config.batch_size, config.seed, epoch)
        return training_batches(batches, config, self.world)

    def _after_step(self, begin: float, clips: int) -> float:
        """Shows, saves and stops where it is time to; returns the time."""
        config, at = self.config, self.progress
        now = time.perf_counter()
        at.seconds += now - begin
        speed = clips / max(now - begin, 1e-9)
        self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed
        self.reporter.update(self._status())
        every = config.checkpoint_steps
        if every and (at.batch // config.accumulate) % every == 0:
            self._save_resume_state()
        self._stop_if_asked()
        return now

    def _stop_if_asked(self) -> None:
        received = self.guard.received if self.world.size == 1 else self.stepper.stop
        if received is not None:
            self._save_last()
            self.reporter.stop()
            self.reporter.message(
                f"stopped at epoch {self.progress.epoch + 1}, batch {self.progress.batch};"
                f" continue with --resume auto --out {shlex.quote(str(self.folder.path))}"
            )
            raise StoppedError(received)

    def _enough_steps(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.progress.steps + self.progress.skipped >= limit

    def _end_epoch(self) -> None:
        """Validates, writes the epoch's figures and files, and moves on."""
        config, at = self.config, self.progress
        # What `_batches` leaves out was never begun.
        whole = math.ceil(len(self.data.train) / config.batch_size)
        left_out = whole - self.batches_per_epoch
        row: Row = {
            "epoch": at.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": at.loss_sum / at.count if at.count else math.nan,
            "train_accuracy": at.correct / at.count if at.count else math.nan,
            "val_loss": math.nan,
            "val_accuracy": math.nan,
            "val_top5": math.nan,
            "val_count": 0,
            "best": False,
            "steps": at.steps,
            "skipped": at.skipped,
            "dropped_batches": at.dropped + left_out,
            "clips_per_second": at.count / at.seconds if at.seconds else 0.0,
            "waiting": at.waiting / at.seconds if at.seconds else 0.0,
            "seconds": at.seconds,
        }
        if not at.count and not at.skipped:
            reasons = "; ".join(at.broken[:3])
            raise UserError(f"{config.data}: no training video could be read: {reasons}")
        self.world.any_of(self.data.train.unreadable)
        self.world.same_buffers(self.model)
        if self.data.val is not None:
            scores = self._validate(self.data.val)
            row.update(
                val_loss=scores.loss,
                val_accuracy=scores.metrics.top1,
                val_top5=scores.metrics.top5,
                val_count=scores.metrics.count,
            )
        accuracy = row["val_accuracy"] if row["val_count"] else -1.0
        # Without validation the last weights are the best there are.
        if accuracy > at.best_accuracy or not row["val_count"]:
            at.best_accuracy, at.best_epoch, row["best"] = accuracy, at.epoch, True
        self._save_weights(self.folder.path / "last.safetensors", row)
        if row["best"]:
            self._save_weights(self.folder.path / "best.safetensors", row)
        if self.world.is_first:
            self.log.add(row)
        self.reporter.epoch(row)
        patience = config.early_stopping
        stale = patience is not None and at.epoch - at.best_epoch >= patience
        if stale:
            self.reporter.message(f"no better epoch for {patience} epochs: stopping early")
        at.finished = stale or at.epoch + 1 >= self.epochs or self._enough_steps()
        # Short epochs need no new picture each.
        if self.world.is_first and (at.finished or time.monotonic() - self._drawn > 10):
            self._draw_curves()
            self._drawn = time.monotonic()
        at.begin_epoch(at.epoch + 1)
        self._save_resume_state()
        if not at.finished:
            self._stop_if_asked()

    def _draw_curves(self) -> None:
        chance = 1 / len(self.data.classes)
        title, picture = self.config.model, self.folder.path / "curves.png"
        plots.plot_curves(self.log.rows, picture, title, chance)

    def _validate(self, dataset: Any) -> Scores:
        def after_batch(done: int) -> None:
            self.reporter.update(replace(self._status(), phase="val"))
            self._stop_if_asked()

        return self._score(self.model, dataset, after_batch)

    def _score(
        self, model: nn.Module, dataset: Any, after_batch: Callable[[int], None] | None = None
    ) -> Scores:
        """Runs a model over a split: every process over its own videos, each video once."""
        own = score(
            model,
            self.regime,
            dataset,
            len(self.data.classes),
            places=self.world.share(range(len(dataset))),
            batch_size=max(1, self.config.batch_size // self.world.size),
            workers=self.workers,
            device=self.device,
            after_batch=after_batch,
        )
        return merge(self.world.gather(own))

    def _status(self) -> Status:
        at = self.progress
        return Status(
            epoch=at.epoch,
            epochs=self.epochs,
            batch=at.batch,
            batches=self.batches_per_epoch,
            loss=at.loss_sum / at.count if at.count else math.nan,
            accuracy=at.correct / at.count if at.count else math.nan,
            lr=self.optimizer.param_groups[0]["lr"],
            clips_per_second=self._speed,
            waiting=min(at.waiting / at.seconds, 1.0) if at.seconds else 0.0,
            skipped=at.skipped,
        )

    def _save_weights(self, path: Path, row: Row | None = None) -> None:
        if not self.world.is_first:
            return
        info = self.data.model_info(self.model, self.config)
        if row is not None:
            figures = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}
            if not row["val_count"]:
                del figures["val_accuracy"]
            info = replace(info, extra={**info.extra, **figures})
        try:
            weights.save(path, self.model, info, self.regime.file_dtype)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; the previous checkpoint is intact"
            ) from error

    def _save_last(self) -> None:
        self.world.same_buffers(self.model)
        self._save_weights(self.folder.path / "last.safetensors")
        self._save_resume_state()

    def _save_resume_state(self) -> None:
        self.world.same_buffers(self.model)
        # Each process draws its own numbers; the rest of the state is the same in all of them.
        first, *others = self.world.gather(checkpoint.random_state())
        if not self.world.is_first:
            return
        checkpoint.save_resume_state(
            self.folder.resume_file,
            {
                "config": self.config.to_dict(),
                "classes": list(self.data.classes),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "regime": self.regime.state_dict(),
                "random": first,
                "other_random": others,
                "processes": self.world.size,
                "progress": asdict(self.progress),
                "rows": self.log.rows,
            },
        )

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.regime.load_state_dict(state["regime"])
            self.progress = Progress(**state["progress"])
            self.log.rows = list(state["rows"])
            rank = self.world.rank
            checkpoint.set_random_state(
                state["other_random"][rank - 1] if rank else state["random"]
            )
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.folder.resume_file} does not fit this run: {reason}") from error
        if self.log.rows and self.world.is_first:
            self.log.write()

    def _finish(self) -> TrainResult:
        """Reads the test split once, with the weights that validation chose."""
        at, path = self.progress, self.folder.path
        results = path / "test" / "results.json"
        test = self.world.from_first(json.loads(results.read_text()) if results.is_file() else None)
        if test is None and self.data.test is not None:
            best = path / "best.safetensors"
            model, _ = weights.load(best, device=str(self.device))
            result = EvalResult.of_scores(
                self._score(model, self.data.test),
                self.data.test,
                weights=str(best),
                epoch=at.best_epoch,
                split="test",
                clips=1,
                crops=1,
                model=self.config.model,
                precision=self.regime.name,
                seed=self.config.seed,
                protocol=self.data.protocol.to_dict(),
                missing=self.data.missing,
            )
            if self.world.is_first:
                result.save(results.parent)
            test = result.to_dict()
        unreadable = self.data.list_unreadable(path, self.world)
        return TrainResult(
            folder=path,
            best_epoch=at.best_epoch,
            best_accuracy=at.best_accuracy if self.data.val is not None else math.nan,
            test=test,
            steps=at.steps,
            skipped=at.skipped,
            missing=self.data.missing,
            unreadable=unreadable,
        )
