"""The `ca3d` command.

`table` lists the commands, `parser` reads their options, `main` runs one and reports errors;
`model_commands`, `data_commands` and `study_commands` hold what they do.
"""

from ca3d.cli.main import main
from ca3d.cli.parser import make_parser, parse
from ca3d.cli.table import COMMANDS

__all__ = ["COMMANDS", "main", "make_parser", "parse"]
