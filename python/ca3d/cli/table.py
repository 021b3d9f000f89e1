"""The commands of `ca3d`, where their options and functions are, and what their help says."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

INSTALL = 'pip install "ca3d-kernels[app]"'


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `ca3d`.

    Args:
        name: What the user types, such as "data make".
        config: Module and class of its options, as "module:class".
        run: Module and name of its function, likewise.
        help: One line for `ca3d --help`.
        examples: Command lines for its own help.

    Example:
        >>> COMMANDS[0].name
        'train'
    """

    name: str
    config: str
    run: str
    help: str
    examples: tuple[str, ...] = ()


COMMANDS = (
    Command(
        "train",
        "ca3d.training.config:TrainConfig",
        "ca3d.cli.model_commands:train",
        "train a model on a folder of videos",
        (
            "ca3d train my_videos --out runs/mine",
            "ca3d train my_videos --out runs/mine --resume auto",
            "ca3d train UCF-101 --dataset ucf101 --fold 1 --split-files ucfTrainTestlist",
            "torchrun --nproc-per-node 2 -m ca3d train my_videos --out runs/mine --sync-bn",
            "ca3d train my_videos --init-from runs/mine --freeze '(?!classifier)' --out runs/head",
            "ca3d train --config runs/mine/config.yaml --lr 0.005 --out runs/faster",
        ),
    ),
    Command(
        "eval",
        "ca3d.evaluate:EvalConfig",
        "ca3d.cli.model_commands:evaluate",
        "measure a model on a split",
        (
            "ca3d eval runs/mine my_videos",
            "ca3d eval runs/mine my_videos --clips 10 --crops 3 --out results",
            "ca3d eval runs/mine long_videos --untrimmed",
        ),
    ),
    Command(
        "results",
        "ca3d.results:ResultsConfig",
        "ca3d.cli.model_commands:results",
        "put the test figures of several runs into one table",
        (
            "ca3d results runs/ucf101-*",
            "ca3d results runs/ucf101-1 runs/ucf101-2 runs/ucf101-3 --format csv",
        ),
    ),
    Command(
        "predict",
        "ca3d.cli.options:PredictConfig",
        "ca3d.cli.model_commands:predict",
        "recognise what happens in video files",
        (
            "ca3d predict new.mp4 --weights runs/mine",
            "ca3d predict new.mp4 --weights runs/mine --picture timeline.png",
            "ca3d predict folder --weights runs/mine --json > labels.json",
            "ca3d predict new.mp4 --weights exported --runtime onnx",
        ),
    ),
    Command(
        "watch",
        "ca3d.watch.options:WatchConfig",
        "ca3d.cli.model_commands:watch",
        "recognise what happens in front of a camera, in private",
        (
            "ca3d watch rtsp://camera.local/stream --weights runs/mine --credentials camera.txt",
            "ca3d watch 0 --weights runs/mine --events events.jsonl",
            "ca3d watch day.mp4 --weights runs/mine --view 'roi 100,0,480,480'",
            "ca3d watch day.mp4 --weights runs/mine --realtime --stats",
        ),
    ),
    Command(
        "calibrate",
        "ca3d.watch.calibrate:CalibrateConfig",
        "ca3d.cli.model_commands:calibrate",
        "fit temperature and thresholds on validation videos, and store them in the weights",
        ("ca3d calibrate runs/mine my_videos",),
    ),
    Command(
        "convert",
        "ca3d.cli.options:ConvertConfig",
        "ca3d.cli.model_commands:convert",
        "turn published weights into a weights file",
        (
            "ca3d convert ca3d_f16.pt --out ca3d.safetensors --classes classes.txt"
            " --mean 0.4 0.4 0.4 --std 0.2 0.2 0.2",
        ),
    ),
    Command(
        "export",
        "ca3d.export.options:ExportConfig",
        "ca3d.cli.model_commands:export",
        "write a model for ONNX Runtime or ExecuTorch, run it there, compare",
        (
            "ca3d export onnx runs/mine --out exported",
            "ca3d export onnx runs/mine --out exported-int8 --precision int8"
            " --calibration my_videos --check-data my_videos",
            "ca3d export onnx runs/mine --out exported-stream --stream --stride 2",
            "ca3d export executorch runs/mine --out exported-pte",
        ),
    ),
    Command(
        "data make",
        "ca3d.cli.options:MakeConfig",
        "ca3d.cli.data_commands:make",
        "render one of the package's own data sets as video files",
        ("ca3d data make mocap30 videos/mocap30",),
    ),
    Command(
        "data check",
        "ca3d.cli.options:CheckConfig",
        "ca3d.cli.data_commands:check",
        "look for missing, broken and short videos and overlapping splits",
        ("ca3d data check my_videos",),
    ),
    Command(
        "data cache",
        "ca3d.cli.options:CacheConfig",
        "ca3d.cli.data_commands:cache",
        "decode and shrink all videos once",
        ("ca3d data cache my_videos --short-side 128",),
    ),
    Command(
        "data split",
        "ca3d.cli.options:SplitConfig",
        "ca3d.cli.data_commands:split",
        "divide a data set into train, val and test",
        (
            "ca3d data split my_videos --val 0.15 --test 0.15",
            "ca3d data split my_videos --group '(person\\d+)_'",
        ),
    ),
    Command(
        "data list",
        "ca3d.cli.options:ListConfig",
        "ca3d.cli.data_commands:list_sets",
        "list the data sets that `data make` knows",
    ),
    Command(
        "footprint",
        "ca3d.footprint:FootprintConfig",
        "ca3d.cli.study_commands:footprint",
        "measure memory and speed of models in precision regimes",
        (
            "ca3d footprint",
            "ca3d footprint --models ca3d,ca3d_l --regimes float32,float16 --json footprint.json",
            "ca3d footprint --models all --regimes float32,qat,float16 --batch 4",
            "ca3d footprint --models r3d_18,ca3d:pool=published --regimes float32",
        ),
    ),
    Command(
        "compare",
        "ca3d.experiments.compare:CompareConfig",
        "ca3d.cli.study_commands:compare",
        "train models in precision regimes under several seeds, and compare them",
        (
            "ca3d compare my_videos --models ca3d,r3d_18 --regimes float32,float16",
            "ca3d compare mocap30 --models ca3d_tiny,r3d_tiny --frames 8 --size 32 --epochs 10",
            "ca3d compare UCF101 --preset table1a",
        ),
    ),
    Command(
        "study precision",
        "ca3d.experiments.precision_study:PrecisionStudyConfig",
        "ca3d.cli.study_commands:study_precision",
        "train a grid of small models in float16 and say what its parts repair",
        (
            "ca3d study precision --out studies/precision",
            "ca3d study precision --out studies/precision --only-report",
        ),
    ),
    Command(
        "study results",
        "ca3d.experiments.results_study:ResultsStudyConfig",
        "ca3d.cli.study_commands:study_results",
        "compare small models at equal multiply-adds, with controls",
        (
            "ca3d study results --budget-hours 8 --out studies/results",
            "ca3d study results --scale tiny --datasets motion-order --regimes float32",
        ),
    ),
    Command(
        "study claims",
        "ca3d.experiments.claims_study:ClaimsConfig",
        "ca3d.cli.study_commands:study_claims",
        "replace the model's parts one at a time",
        (
            "ca3d study claims --only position,keys --scale tiny",
            "ca3d study claims --budget-hours 8 --out studies/claims",
        ),
    ),
    Command(
        "bench",
        "ca3d.edge_bench:BenchConfig",
        "ca3d.cli.study_commands:bench",
        "measure latency and memory: whole clips and streams, in each runtime",
        (
            "ca3d bench edge",
            "ca3d bench edge --runtimes onnx --precisions float32,float16,int8 --json edge.json",
        ),
    ),
    Command(
        "demo",
        "ca3d.demo:DemoConfig",
        "ca3d.cli.first_commands:demo",
        "make videos, train on them, recognise unseen ones, leave a report",
        ("ca3d demo", "ca3d demo --out demo --quick"),
    ),
    Command(
        "info",
        "ca3d.cli.options:InfoConfig",
        "ca3d.cli.first_commands:info",
        "describe this installation, a weights file, a run or a video",
        ("ca3d info", "ca3d info runs/mine", "ca3d info --models"),
    ),
)

#: Commands of two words, by the first one.
GROUPS = {
    "data": "make, check, divide and cache data sets",
    "study": "train many small models to answer a question",
}


def load(place: str) -> Any:
    """Imports what a command names.

    Args:
        place: "module:name", as in `Command.config` and `Command.run`.

    Example:
        >>> load(COMMANDS[0].config).__name__
        'TrainConfig'
    """
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
