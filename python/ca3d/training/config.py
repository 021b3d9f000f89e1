"""The options of a training run."""

# `option` returns dataclasses.field(...), which is what a default should be.
# ruff: noqa: RUF009

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ca3d.data.split_options import SplitOptions
from ca3d.data.view import View
from ca3d.errors import UserError
from ca3d.options import option

_LARGEST = 4096  # pixels of a clip side

Decoder = Literal["auto", "av", "torchcodec"]


@dataclass
class TrainConfig(SplitOptions):
    """Every option of `ca3d train`; `ca3d train --help` prints what each of them means.

    The defaults are the published recipe: SGD with momentum 0.9, batches of 20, weight decay
    5e-3, 50 epochs whose learning rate climbs from `lr` to ten times `lr` during the first 10
    and is halved every 5 from the 25th on (stretched in proportion for another `epochs`).

    Raises:
        ca3d.errors.UserError: From `validate`, naming the option, its value and what is allowed.

    Example:
        >>> TrainConfig(data="videos", out="run", lr=0.0).validate()
        Traceback (most recent call last):
        ca3d.errors.UserError: --lr must be a finite number above 0, not 0.0
    """

    data: str = option(
        "", "Folder with one sub-folder of videos per class", "Data", positional=True
    )
    out: str = option("", "Folder for this run's results (default: runs/NAME-MODEL)", "Data")
    train_list: str | None = option(
        None, "CSV or JSON-lines file of training videos (path,label), instead of the split", "Data"
    )
    val_list: str | None = option(None, "The same for validation", "Data")
    test_list: str | None = option(None, "The same for testing", "Data")
    val_fraction: float = option(
        0.15, "Share of the videos for validation if DATA brings no list of it", "Data"
    )
    test_fraction: float = option(0.15, "Share for testing if DATA brings no split files", "Data")
    split_seed: int = option(0, "Seed of the random split", "Data")
    group: str | None = option(
        None,
        "Regular expression on file names whose first group (or match) names the recording; clips"
        " of one recording stay on one side of the split",
        "Data",
    )
    frames: int = option(16, "Frames in a clip", "Clips")
    stride: int = option(2, "Frames from one sampled frame to the next", "Clips")
    fps: float | None = option(
        None,
        "Frame rate that --stride counts in; videos of other rates are resampled by time stamps"
        " (default: the data set's own)",
        "Clips",
    )
    size: int = option(112, "Height and width of a clip in pixels", "Clips")
    resize: int | None = option(None, "Short side before cropping (default: --size)", "Clips")
    view: str = option(
        "center",
        "Region of the frames: center, letterbox, or 'roi X,Y,W,H' in pixels or in shares of the"
        " frame",
        "Clips",
    )
    flip: bool | None = option(
        None, "Mirror training clips at random (default: as the data set declares)", "Clips"
    )
    reverse: bool | None = option(
        None,
        "Play training clips backwards at random (default: as the data set declares, else no)",
        "Clips",
    )
    augment: Literal["light", "none"] = option(
        "light", "'light': the published draws of size, rotation and crop", "Clips"
    )
    decoder: Decoder = option("auto", "Video decoder", "Clips")
    mean: list[float] | None = option(
        None,
        "Means of red, green and blue in [0, 1] (blue first with --protocol published; default:"
        " measured on the training split)",
        "Clips",
        count=3,
    )
    std: list[float] | None = option(None, "Their standard deviations", "Clips", count=3)

    model: str = option("ca3d", "Model to train (see `ca3d info --models`)", "Model")
    model_options: dict[str, Any] = option(
        None,
        "Further options of the model, as --model-options.NAME VALUE",
        "Model",
        factory=dict,
    )
    init_from: str | None = option(
        None,
        "Weights file to start from; the classifier is replaced when the classes differ",
        "Model",
    )
    freeze: str | None = option(
        None,
        "Regular expression; parameters whose name matches from the start are not trained"
        " ('(?!classifier)' freezes all but the classifier)",
        "Model",
    )
    sync_bn: bool = option(
        False,
        "BatchNorm statistics over the clips of all processes (torchrun), not of each on its own",
        "Model",
    )
    freeze_bn: bool = option(False, "Keep BatchNorm statistics as they are", "Model")
    precision: str = option(
        "float32",
        "Precision regime: float32, bfloat16, float16, raw-float16, float16-published, float16-sqr,"
        " float16-root, qat, fake-quant, ptq-float16",
        "Model",
    )
    precision_options: dict[str, Any] = option(
        None,
        "Further options of a float16 regime, as --precision-options.NAME VALUE: constant,"
        " loss_factor, rounding",
        "Model",
        factory=dict,
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)", "Model")

    epochs: int = option(50, "Passes over the training split", "Recipe")
    batch_size: int = option(
        20, "Clips in a batch, over all processes (torchrun) together", "Recipe"
    )
    accumulate: int = option(1, "Batches whose gradients make one optimizer step", "Recipe")
    optimizer: Literal["sgd", "adamw"] = option("sgd", "Optimizer", "Recipe")
    lr: float = option(
        1e-3,
        "Learning rate; 'published' climbs to ten times this, 'cosine' and 'onecycle' to this",
        "Recipe",
    )
    momentum: float = option(0.9, "SGD's momentum, AdamW's beta 1", "Recipe")
    weight_decay: float | None = option(
        None,
        "Weight decay, on every parameter but transformers' class tokens and positional tables"
        " (default: as published for the model, 5e-3 for CA3D)",
        "Recipe",
    )
    schedule: Literal["published", "cosine", "onecycle", "constant"] = option(
        "published", "Learning rate over time", "Recipe"
    )
    warmup_epochs: float | None = option(
        None, "Epochs of warm-up (default: a fifth of --epochs; 0 for 'constant')", "Recipe"
    )
    milestones: list[int] | None = option(
        None,
        "Epochs at which 'published' halves the rate (default: 25 30 35 40 45 of 50)",
        "Recipe",
        count="+",
    )
    clip_norm: float | None = option(
        None, "Longest gradient (L2 norm over all parameters); longer ones are scaled", "Recipe"
    )
    label_smoothing: float = option(0.0, "Label smoothing, in [0, 1)", "Recipe")
    class_weights: Literal["none", "balanced"] = option(
        "none", "'balanced' weights the loss of a class by 1 / its number of videos", "Recipe"
    )
    max_steps: int | None = option(None, "Stop after so many optimizer steps", "Recipe")
    early_stopping: int | None = option(
        None, "Stop after so many epochs without a better validation accuracy", "Recipe"
    )
    max_skipped: int = option(
        20, "Stop after so many steps in a row with a loss or gradient that is not finite", "Recipe"
    )
    seed: int = option(0, "Seed of weights, order, sampling and dropout", "Recipe")

    resume: Literal["never", "auto"] = option(
        "never", "'auto' continues the run found in --out, bit for bit", "Run"
    )
    checkpoint_steps: int = option(
        200, "Optimizer steps between checkpoints (0: only at the end of epochs)", "Run"
    )
    workers: int | None = option(
        None, "Processes that read videos (0: none; default: up to 4, by cores)", "Run"
    )
    deterministic: bool = option(
        False, "Refuse operations that may differ from run to run (GPU; slower)", "Run"
    )
    log_steps: int = option(50, "Steps between log lines where there is no terminal", "Run")
    tensorboard: bool = option(False, "Also write TensorBoard logs", "Run")
    progress: Literal["auto", "rich", "plain", "none"] = option("auto", "Progress display", "Run")

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        self.validate_split()
        positive = ("frames", "stride", "size", "epochs", "batch_size", "accumulate", "log_steps")
        for name in positive:
            _check(self, name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("resize", "max_steps", "early_stopping"):
            value = getattr(self, name)
            _check(self, name, value is None or value >= 1, "a whole number of at least 1")
        for name in ("size", "resize"):
            value = getattr(self, name)
            _check(self, name, value is None or value <= _LARGEST, f"at most {_LARGEST}")
        for name in ("checkpoint_steps", "seed", "split_seed"):
            _check(self, name, getattr(self, name) >= 0, "a whole number of at least 0")
        _check(self, "max_skipped", self.max_skipped >= 1, "a whole number of at least 1")
        _check(self, "workers", self.workers is None or self.workers >= 0, "at least 0")
        _check(self, "batch_size", self.batch_size >= 2, "at least 2 (BatchNorm needs it)")
        for name in ("lr", "fps", "clip_norm"):
            value = getattr(self, name)
            fine = value is None or (math.isfinite(value) and value > 0)
            _check(self, name, fine, "a finite number above 0")
        _check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        decay = self.weight_decay
        fine = decay is None or (math.isfinite(decay) and decay >= 0)
        _check(self, "weight_decay", fine, "finite and not negative")
        warmup = self.warmup_epochs
        fine = warmup is None or (math.isfinite(warmup) and 0 <= warmup <= self.epochs)
        _check(self, "warmup_epochs", fine, "between 0 and --epochs")
        for name in ("val_fraction", "test_fraction"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError(
                f"--val-fraction {self.val_fraction} and --test-fraction {self.test_fraction}"
                " leave nothing to train on; their sum must be below 1"
            )
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"--resize {self.resize} must be at least --size {self.size}")
        View.parse(self.view)
        for name in ("mean", "std"):
            value = getattr(self, name)
            lowest = 0.0 if name == "mean" else 1e-6
            fine = value is None or (
                len(value) == 3 and all(math.isfinite(x) and lowest <= x <= 1 for x in value)
            )
            _check(self, name, fine, f"three numbers in [{lowest:g}, 1]")
        if self.train_list is not None and (self.dataset != "auto" or self.split_files is not None):
            raise UserError("--train-list and --dataset or --split-files exclude each other")
        if self.protocol == "published":
            self._validate_published()
        if (self.mean is None) != (self.std is None):
            raise UserError("--mean and --std must be given together")
        milestones = self.milestones
        fine = milestones is None or (
            all(m >= 0 for m in milestones) and list(milestones) == sorted(milestones)
        )
        _check(self, "milestones", fine, "ascending epochs of at least 0")
        if milestones is not None and self.schedule != "published":
            raise UserError(f"--milestones are those of --schedule published, not {self.schedule}")

    def _validate_published(self) -> None:
        """Raises `UserError` for an option that the published protocol fixes."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        fixed = {
            **dict.fromkeys(
                ("train_list", "val_list", "test_list", "group"), "draws its own split"
            ),
            **dict.fromkeys(("val_fraction", "test_fraction"), "has shares of 70/15/15"),
            "split_seed": "has seed 100",
            "fps": "counts the frames of the video",
        }
        for name, why in fixed.items():
            if getattr(self, name) != defaults[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag} {getattr(self, name)}: --protocol published {why}; leave it out"
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns all options as plain values, as the run's `config.yaml` holds them.

        Example:
            >>> TrainConfig(data="videos", out="run").to_dict()["batch_size"]
            20
        """
        return dataclasses.asdict(self)


def _check(config: TrainConfig, name: str, fine: bool, allowed: str) -> None:
    if not fine:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} must be {allowed}, not {getattr(config, name)!r}")
