"""One optimizer step: forward, loss and backward of its batches, in every process of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ca3d.errors import UserError
from ca3d.precision import Regime
from ca3d.training.config import TrainConfig
from ca3d.training.diagnosis import first_nonfinite, last_nonfinite_gradient
from ca3d.training.distributed import World
from ca3d.training.interrupt import SignalGuard
from ca3d.training.loader import Batch
from ca3d.training.progress import Reporter
from ca3d.training.state import Progress


class Stepper:
    """Takes optimizer steps.

    Args:
        config: The options.
        model: The model.
        network: What `World.wrap` made of it.
        regime: The precision.
        optimizer: Of the model's parameters.
        device: Where to compute.
        world: The processes of the run.
        guard: Knows of signals to this process.
        reporter: Shows broken files.
        loss_weights: (classes,) or None.

    Attributes:
        parameters: Those that are trained.
        stop: A signal that one of the processes has received; all of them know it from the same
            step on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        network: nn.Module,
        regime: Regime,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        world: World,
        guard: SignalGuard,
        reporter: Reporter,
        loss_weights: Tensor | None,
    ) -> None:
        self.config, self.model, self.network, self.regime = config, model, network, regime
        self.optimizer, self.device, self.world = optimizer, device, world
        self.guard, self.reporter, self.loss_weights = guard, reporter, loss_weights
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.least = smallest_share(config, world)
        self.stop: int | None = None

    def take(
        self, stream: Iterator[Batch], batches: int, planned: int, rate: float, at: Progress
    ) -> None:
        """Takes a step, or skips it where a loss or gradient is not finite.

        Args:
            stream: Gives this process's shares of the batches.
            batches: Number of batches.
            planned: Clips in them, over all processes.
            rate: Learning rate.
            at: Counted up.

        Raises:
            ca3d.errors.UserError: Too many steps in a row were skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # A forward pass that overflows spoils BatchNorm's running statistics too.
        buffers = [buffer.detach().clone() for buffer in self.model.buffers()]
        finite, used, summed, bad_clips = True, 0, True, None
        for number in range(batches):
            waited = time.perf_counter()
            batch = next(stream)
            at.waiting += time.perf_counter() - waited
            self._note_broken(batch, at)
            clips, weight = self._clips(batch)
            if not clips:
                at.dropped += 1
                continue
            inputs, labels = batch.clips.to(self.device), batch.labels.to(self.device)
            more = number + 1 < batches
            with self.world.accumulating(self.network, more):
                logits = self.regime.forward(self.network, inputs)
                loss = self.regime.loss(
                    logits,
                    labels,
                    weight=self.loss_weights,
                    label_smoothing=self.config.label_smoothing,
                )
                correct = int((logits.detach().argmax(1) == labels).sum())
                value, correct = self._agree(float(loss.detach()) * weight, correct)
                if not math.isfinite(value):
                    finite, bad_clips = False, inputs
                    continue
                self.regime.backward(loss * (weight * clips / planned))
            used, summed = used + clips, not more
            at.loss_sum += value * clips
            at.correct += correct
            at.count += clips
        overflowed = "a gradient"
        if finite and used:
            if not summed:
                self.world.sum_gradients(self.parameters)
            if used != planned:
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                torch._foreach_mul_(gradients, planned / used)
            if at.skipped_in_row + 1 >= self.config.max_skipped:  # a step would clear them
                overflowed = last_nonfinite_gradient(self.model) or overflowed
            step = self.regime.step(self.optimizer, self.parameters, self.config.clip_norm)
            finite = step.applied
        if finite:
            at.steps += bool(used)
            at.skipped_in_row = 0 if used else at.skipped_in_row
            return
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        at.skipped += 1
        at.skipped_in_row += 1
        if at.skipped_in_row >= self.config.max_skipped:
            self._give_up(at, rate, overflowed, bad_clips)

    def _clips(self, batch: Batch) -> tuple[int, float]:
        """Returns the clips of a batch over all processes and this one's weight in its loss; no
        clips where a process has too few to normalise."""
        if self.world.size == 1:
            return (len(batch), 1.0) if len(batch) >= self.least else (0, 0.0)
        # A weighted mean over a batch divides by the weights of its clips, not by their number.
        weight = float(len(batch))
        if self.loss_weights is not None:
            weight = float(self.loss_weights.cpu()[batch.labels].double().sum())
        rows = self.world.rows([len(batch), weight])
        if rows[:, 0].min() < self.least:
            return 0, 0.0
        return int(rows[:, 0].sum()), weight / float(rows[:, 1].sum())

    def _agree(self, loss: float, correct: int) -> tuple[float, int]:
        """Returns the loss and the right answers of all processes, and notes their signals."""
        if self.world.size == 1:
            self.stop = self.guard.received
            return loss, correct
        rows = self.world.rows([loss, correct, self.guard.received or 0])
        self.stop = int(rows[:, 2].max()) or None
        return float(rows[:, 0].sum()), int(rows[:, 1].sum())

    def _note_broken(self, batch: Batch, at: Progress) -> None:
        for message in batch.broken:
            if message not in at.broken:
                at.broken.append(message)
                self.reporter.message(f"skipped: {message}")

    def _give_up(
        self, at: Progress, rate: float, overflowed: str, bad_clips: Tensor | None
    ) -> None:
        where = overflowed
        if bad_clips is not None and self.world.size == 1:
            where = f"the output of {first_nonfinite(self.model, self.regime, bad_clips)}"
        elif bad_clips is not None:
            where = "a loss"
        raise UserError(
            f"{at.skipped_in_row} steps in a row were not finite ({where} overflowed or is"
            f" NaN) at epoch {at.epoch + 1}, learning rate {rate:.3g}: lower --lr or set"
            " --clip-norm"
        )


def smallest_share(config: TrainConfig, world: World) -> int:
    """Returns the fewest clips with which a process can take part in a step.

    Normalisation by the batch needs two clips: in each process, or with `sync_bn` in all of them.

    Example:
        >>> smallest_share(TrainConfig(), World())
        2
    """
    return 1 if config.sync_bn and world.size > 1 else 2


def training_batches(
    batches: Sequence[Sequence[int]], config: TrainConfig, world: World
) -> list[list[int]]:
    """Leaves out a last batch that has too few clips for the processes.

    Args:
        batches: The batches of an epoch, from `ca3d.training.loader.epoch_batches`.
        config: The options.
        world: The processes of the run.

    Example:
        >>> training_batches([[0, 1, 2, 3], [4, 5, 6]], TrainConfig(), World(0, 2))
        [[0, 1, 2, 3]]
    """
    least = smallest_share(config, world) * world.size
    return [list(batch) for batch in batches if len(batch) >= least]
