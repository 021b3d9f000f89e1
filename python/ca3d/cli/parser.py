"""Reads the command line: options of dataclasses, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from ca3d.cli.table import COMMANDS, GROUPS, INSTALL, Command, load
from ca3d.errors import UserError
from ca3d.watch.credentials import redact


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
    for key, value in values.items():
        # A comparison with NaN is false, so that it would pass most of the commands' own checks.
        if any(number != number for number in (value if isinstance(value, list) else [value])):
            _refuse(f"ca3d {name}", f"--{_flag(key)} must be a number, not nan")
    config = load(command.config)(**values)
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
            _refuse(program, redact(_in_our_words(message)))

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
            _add_options(child, load(command.config))
    return parser


_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false"}


def _in_our_words(message: str) -> str:
    """Says what jsonargparse found wrong as the commands' own checks say it."""
    line = re.sub(r"\s+", " ", message).strip()
    line = re.sub(r"<class '(\w+)'>", r"\1", line)
    wrong = re.match(
        r'Parser key "([\w.]+)"(?: element \d+)?: '
        r".*?Expected a (float|int|bool|typing\.Literal\[.*?\])[ .].*?(?:Got|Given) value: ?(.*)",
        line,
    )
    if wrong:
        name, kind, value = wrong.groups()
        choice = kind.removeprefix("typing.Literal[").rstrip("]").replace("'", "")
        allowed = _KINDS.get(kind, f"one of {choice}")
        return f"--{_flag(name)} must be {allowed}, not {value or repr(value)}"
    return re.sub(r'Parser key "([\w.]+)":', lambda m: f"--{_flag(m[1])}:", line)


def _refuse(program: str, why: str) -> NoReturn:
    print(f"{program}: error: {why} (see {program} --help)", file=sys.stderr)
    sys.exit(2)


def _add_options(parser: Any, config: type) -> None:
    from jsonargparse import ActionConfigFile, ActionYesNo

    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of options; flags override it"
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
            # With --no-FLAG, which overrides a configuration file.
            action = ActionYesNo(no_prefix="no-")
            groups[title].add_argument(flag, action=action, default=default, help=about["help"])
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
        "watch": ("source", "weights"),
        "calibrate": ("weights", "data"),
        "convert": ("input", "out"),
        "export": ("format", "weights", "out"),
        "bench": ("suite",),
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
        _refuse(f"ca3d {name}", f"{shown} must be given")
