"""The `ca3d` command.

`table` lists the commands, `parser` reads their options, `entry` runs one and reports errors;
`first_commands`, `model_commands`, `data_commands` and `study_commands` hold what they do.
"""

from ca3d.cli.entry import main
from ca3d.cli.parser import make_parser, parse
from ca3d.cli.table import COMMANDS

__all__ = ["COMMANDS", "main", "make_parser", "parse"]
