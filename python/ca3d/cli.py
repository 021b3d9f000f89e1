"""The `ca3d` command: reading options, running a command, reporting errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from ca3d.errors import UserError

INSTALL = 'pip install "ca3d-kernels[app]"'


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `ca3d`.

    Args:
        name: What the user types, such as "data make".
        config: Module and class of its options, as "module:class".
        run: Name of its function in `ca3d.commands`.
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
        "train",
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
        "evaluate",
        "measure a model on a split",
        (
            "ca3d eval runs/mine my_videos",
            "ca3d eval runs/mine my_videos --clips 10 --crops 3 --out results",
        ),
    ),
    Command(
        "results",
        "ca3d.results:ResultsConfig",
        "results",
        "put the test figures of several runs into one table",
        (
            "ca3d results runs/ucf101-*",
            "ca3d results runs/ucf101-1 runs/ucf101-2 runs/ucf101-3 --format csv",
        ),
    ),
    Command(
        "predict",
        "ca3d.command_options:PredictConfig",
        "predict",
        "recognise what happens in video files",
        (
            "ca3d predict new.mp4 --weights runs/mine",
            "ca3d predict new.mp4 --weights runs/mine --picture timeline.png",
            "ca3d predict folder --weights runs/mine --json > labels.json",
        ),
    ),
    Command(
        "convert",
        "ca3d.command_options:ConvertConfig",
        "convert",
        "turn published weights into a weights file",
        (
            "ca3d convert ca3d_f16.pt --out ca3d.safetensors --classes classes.txt"
            " --mean 0.4 0.4 0.4 --std 0.2 0.2 0.2",
        ),
    ),
    Command(
        "data make",
        "ca3d.command_options:MakeConfig",
        "data_make",
        "render one of the package's own data sets as video files",
        ("ca3d data make mocap30 videos/mocap30",),
    ),
    Command(
        "data check",
        "ca3d.command_options:CheckConfig",
        "data_check",
        "look for missing, broken and short videos and overlapping splits",
        ("ca3d data check my_videos",),
    ),
    Command(
        "data cache",
        "ca3d.command_options:CacheConfig",
        "data_cache",
        "decode and shrink all videos once",
        ("ca3d data cache my_videos --short-side 128",),
    ),
    Command(
        "data split",
        "ca3d.command_options:SplitConfig",
        "data_split",
        "divide a data set into train, val and test",
        (
            "ca3d data split my_videos --val 0.15 --test 0.15",
            "ca3d data split my_videos --group '(person\\d+)_'",
        ),
    ),
    Command(
        "data list",
        "ca3d.command_options:ListConfig",
        "data_list",
        "list the data sets that `data make` knows",
    ),
    Command(
        "footprint",
        "ca3d.footprint:FootprintConfig",
        "footprint",
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
        "compare",
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
        "study_precision",
        "train a grid of small models in float16 and say what its parts repair",
        (
            "ca3d study precision --out studies/precision",
            "ca3d study precision --out studies/precision --only-report",
        ),
    ),
    Command(
        "study results",
        "ca3d.experiments.results_study:ResultsStudyConfig",
        "study_results",
        "compare small models at equal multiply-adds, with controls",
        (
            "ca3d study results --budget-hours 8 --out studies/results",
            "ca3d study results --scale reduced --datasets motion-order --regimes float32",
        ),
    ),
    Command(
        "study claims",
        "ca3d.experiments.claims_study:ClaimsConfig",
        "study_claims",
        "replace the model's parts one at a time",
        (
            "ca3d study claims --only position,keys --scale reduced",
            "ca3d study claims --budget-hours 8 --out studies/claims",
        ),
    ),
    Command(
        "demo",
        "ca3d.demo:DemoConfig",
        "demo",
        "make videos, train on them, recognise unseen ones, leave a report",
        ("ca3d demo", "ca3d demo --out demo --quick"),
    ),
    Command(
        "info",
        "ca3d.command_options:InfoConfig",
        "info",
        "describe this installation, a weights file, a run or a video",
        ("ca3d info", "ca3d info runs/mine", "ca3d info --models"),
    ),
)


#: Commands of two words, by the first one.
GROUPS = {
    "data": "make, check, divide and cache data sets",
    "study": "train many small models to answer a question",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `ca3d` command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 fine, 1 an error of the user's, 2 no command, 128 + the signal that
        stopped it. Wrong usage and `--help` leave by `SystemExit` (2 and 0), as argparse has it.

    Example:
        >>> main(["info", "missing.safetensors"])
        1
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    name = "ca3d"
    previous = _catch_termination()
    try:
        if not arguments:
            make_parser("-").print_help()
            return 2
        command, config = parse(arguments)
        name = f"ca3d {command.name}"
        from ca3d import commands

        run: Callable[[Any], int | None] = getattr(commands, command.run)
        return run(config) or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone; Python would complain once more at exit.
        sys.stdout = None
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(name, error, debug)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def parse(arguments: Sequence[str]) -> tuple[Command, Any]:
    """Reads the command line.

    Args:
        arguments: Arguments without the program's name.

    Returns:
        The command and its options, an instance of its dataclass.

    Raises:
        ca3d.errors.UserError: A package that reads options is missing.

    Example:
        >>> command, config = parse(["train", "videos", "--epochs", "3"])
        >>> command.name, config.data, config.epochs
        ('train', 'videos', 3)
    """
    arguments = _config_first([_dashed(argument) for argument in arguments])
    parser = make_parser(chosen=" ".join(arguments[:2]))
    found = parser.parse_args(arguments)
    name = found.command
    options = found[name]
    if name in GROUPS:
        name = f"{name} {options.action}"
        options = options[options.action]
    command = next(command for command in COMMANDS if command.name == name)
    values = {k: v for k, v in options.as_dict().items() if k != "config"}
    config = load_config_class(command)(**values)
    _check_required(name, config)
    return command, config


def make_parser(chosen: str = "") -> Any:
    """Builds the command line's parser.

    Args:
        chosen: The begin of the command line; options of other commands are left out, which keeps
            `--help` fast. Everything is built when it is empty.

    Returns:
        A `jsonargparse.ArgumentParser`.

    Raises:
        ca3d.errors.UserError: jsonargparse is missing.

    Example:
        >>> make_parser("train").prog
        'ca3d'
    """
    try:
        import jsonargparse
    except ImportError as error:
        raise UserError(f"the command line needs packages that are missing; run: {INSTALL}") from (
            error
        )

    class Parser(jsonargparse.ArgumentParser):
        """Reports wrong usage in one line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            parser = getattr(ex, "subcommand_parser", None) or self
            program = parser.prog.replace(" [options]", "")
            line = re.sub(r"\s+", " ", message).strip()
            line = re.sub(r"<class '(\w+)'>", r"\1", line).replace("typing.Literal", "one of ")
            line = re.sub(r'Parser key "([\w.]+)":', lambda m: f"--{_flag(m[1])}:", line)
            print(f"{program}: error: {line} (see {program} --help)", file=sys.stderr)
            sys.exit(2)

    def new_parser(description: str, examples: Sequence[str] = ()) -> Any:
        epilog = "examples:\n" + "".join(f"  {line}\n" for line in examples) if examples else None
        return Parser(
            description=description, epilog=epilog, formatter_class=_HelpFormatter, add_help=True
        )

    parser = Parser(
        prog="ca3d",
        description="Recognise human activity in videos: train, evaluate and use CA3D models.",
        epilog="`ca3d COMMAND --help` explains a command; --debug shows where an error comes from.",
        formatter_class=_HelpFormatter,
    )
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("ca3d-kernels")
    except PackageNotFoundError:
        release = "(not installed)"
    parser.add_argument("--version", action="version", version=f"ca3d {release}")
    commands = parser.add_subcommands(
        required=True, dest="command", metavar="COMMAND", title="commands", description=" "
    )
    groups: dict[str, Any] = {}
    for command in COMMANDS:
        group, _, action = command.name.rpartition(" ")
        child = new_parser(command.help.capitalize() + ".", command.examples)
        if not group:
            commands.add_subcommand(command.name, child, help=command.help)
        else:
            if group not in groups:
                about = GROUPS[group]
                parent = new_parser(about.capitalize() + ".")
                commands.add_subcommand(group, parent, help=about)
                groups[group] = parent.add_subcommands(
                    required=True, dest="action", metavar="ACTION"
                )
            groups[group].add_subcommand(action, child, help=command.help)
        if not chosen or chosen.startswith(command.name):
            _add_options(child, load_config_class(command), jsonargparse.ActionConfigFile)
    return parser


def load_config_class(command: Command) -> type:
    """Imports the dataclass of a command's options.

    Args:
        command: One of `COMMANDS`.

    Example:
        >>> load_config_class(COMMANDS[0]).__name__
        'TrainConfig'
    """
    import importlib

    module, _, name = command.config.partition(":")
    return getattr(importlib.import_module(module), name)


def _add_options(parser: Any, config: type, config_action: Any) -> None:
    parser.add_argument(
        "--config", action=config_action, help="YAML file of options; flags override it"
    )
    hints = typing.get_type_hints(config)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        about, kind = field.metadata, hints[field.name]
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        title = about["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flag = f"--{_flag(field.name)}"
        if about["positional"]:
            # The flag exists too, so that a configuration file can hold the value.
            name = field.name.upper()
            parser.add_argument(
                field.name,
                nargs=about["count"] or "?",
                type=str,
                default=argparse.SUPPRESS,
                metavar=name,
                help=about["help"],
            )
            groups[title].add_argument(
                flag, type=kind, default=default, metavar=name, help=f"Another way to give {name}"
            )
        elif about["count"] is not None:
            item = typing.get_args(typing.get_args(kind)[0])[0]
            groups[title].add_argument(
                flag, nargs=about["count"], type=item, help=about["help"], metavar=_metavar(item)
            )
        elif kind is bool:
            groups[title].add_argument(flag, action="store_true", help=about["help"])
        else:
            groups[title].add_argument(
                flag, type=kind, default=default, help=about["help"], metavar=_metavar(kind)
            )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help without Python's type names; defaults where they say something."""

    def __init__(self, prog: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(prog.replace(" [options]", ""), max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        empty = default is None or default is False or default in ("", argparse.SUPPRESS, {}, [])
        if not empty and action.option_strings and action.dest != "help" and "default:" not in text:
            text += f" (default: {default})"
        return text.replace("%", "%%")


def _metavar(kind: Any) -> str | None:
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if len(arguments) == 1 and type(None) in typing.get_args(kind):
        return _metavar(arguments[0])
    if typing.get_origin(kind) is dict:
        return "VALUE"
    return {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}.get(kind)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _dashed(argument: str) -> str:
    """Allows --batch_size for --batch-size; values are left alone."""
    if not argument.startswith("--") or argument.startswith("--print_config"):
        return argument
    name, equals, value = argument.partition("=")
    option, dot, key = name.partition(".")
    return _flag(option) + dot + key + equals + value


def _config_first(arguments: list[str]) -> list[str]:
    """Moves `--config FILE` in front of all other options, so that those override it."""
    words = 2 if arguments and arguments[0] in GROUPS else 1
    moved, kept = [], []
    rest = iter(arguments[words:])
    for argument in rest:
        if argument == "--config":
            moved += [argument, *[value for value in [next(rest, None)] if value is not None]]
        elif argument.startswith("--config="):
            moved.append(argument)
        else:
            kept.append(argument)
    return [*arguments[:words], *moved, *kept]


def _check_required(name: str, config: Any) -> None:
    required = {
        "train": ("data",),
        "eval": ("weights", "data"),
        "compare": ("data",),
        "predict": ("path", "weights"),
        "convert": ("input", "out"),
        "data make": ("name", "out"),
        "data check": ("data",),
        "data cache": ("data",),
        "data split": ("data",),
        "results": ("runs",),
    }
    missing = [key for key in required.get(name, ()) if not getattr(config, key)]
    if missing:
        positional = {f.name for f in dataclasses.fields(config) if f.metadata["positional"]}
        shown = " and ".join(k.upper() if k in positional else f"--{_flag(k)}" for k in missing)
        print(
            f"ca3d {name}: error: {shown} must be given (see ca3d {name} --help)", file=sys.stderr
        )
        sys.exit(2)


def _report(name: str, error: Exception, debug: bool) -> int:
    """Prints an error in one line and returns the exit code."""
    from_signal = getattr(error, "exit_code", None)
    if from_signal is not None:
        print(f"{name}: {error}", file=sys.stderr)
        return int(from_signal)
    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("ca3d"):
        message = f"the package {error.name} is missing; run: {INSTALL}"
    elif isinstance(error, MemoryError) or "allocate memory" in str(error):
        message = "out of memory; a smaller --batch-size or --size needs less"
    else:
        if not debug:
            traceback.print_exc()
        message = f"this is a bug ({type(error).__name__}); please report the lines above"
    print(f"{name}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 1


def _catch_termination() -> Any:
    def stop(number: int, frame: FrameType | None) -> None:
        from ca3d.training.interrupt import StoppedError

        raise StoppedError(number)

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Not the main thread.
        return None
