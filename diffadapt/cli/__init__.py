"""The `diffadapt` command. A new subcommand is one file with a `Command`, and one line in `COMMANDS`."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Container, Generator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TextIO

import diffadapt
from diffadapt.cli.combine_adapters import COMBINE
from diffadapt.cli.command import Command
from diffadapt.cli.convert_files import CONVERT
from diffadapt.cli.draw_demo import DEMO
from diffadapt.cli.draw_grid import GRID
from diffadapt.cli.extract_lora import EXTRACT
from diffadapt.cli.inspect_files import INSPECT
from diffadapt.cli.merge_into_model import MERGE
from diffadapt.cli.resize_adapter import RESIZE
from diffadapt.cli.train_adapter import TRAIN
from diffadapt.errors import AdapterError

COMMANDS: tuple[Command, ...] = (INSPECT, CONVERT, RESIZE, COMBINE, EXTRACT, MERGE, GRID, TRAIN, DEMO)

_LIBRARY_LOGS = {"DIFFUSERS_VERBOSITY": "error", "TORCH_LOGS": "-all", "TRANSFORMERS_VERBOSITY": "error"}
_EXIT_STATUS = """exit status:
  0    success
  1    an error in what was asked for; stderr says what and where
  2    wrong options
  130  interrupted by Ctrl-C"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; without a command, print the help.

    Args:
        arguments: command line arguments; defaults to those of the process.

    Returns:
        0 after success, 1 after an error in what was asked for, 130 after Ctrl-C.

    Raises:
        SystemExit: wrong options (status 2), or `--help` and `--version` (status 0).
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    command = next((command for command in COMMANDS if command.name == options.command), None)
    if command is None:
        parser.print_help()
        return 0
    try:
        # What libraries and previews print must not be taken for the result.
        with _without_library_logs(), redirect_stdout(sys.stderr) if options.json else nullcontext():
            result = command.run(options)
    except (AdapterError, OSError) as error:
        print(f"{_in_red('diffadapt:', sys.stderr)} {_in_options(str(error), vars(options))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    text = json.dumps(result.data, indent=2, ensure_ascii=False) if options.json else result.text
    # Of several processes that train together, one reports.
    if text and os.environ.get("RANK", "0") == "0":
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffadapt",
        description="Adapters for diffusers pipelines.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffadapt {diffadapt.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.help)
        command.add_options(own)
        own.add_argument(
            "--json", action="store_true", help="print the result as JSON on stdout, and all else on stderr"
        )
    return parser


@contextmanager
def _without_library_logs() -> Generator[None, None, None]:
    """Keep logged warnings of other libraries off the screen: most are about packages that no command needs."""
    # These set the levels of their loggers themselves when they are imported.
    added = {name: value for name, value in _LIBRARY_LOGS.items() if name not in os.environ}
    os.environ.update(added)
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "diffusers", "torch", "torchao", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        for name in added:
            os.environ.pop(name, None)


def _in_red(text: str, stream: TextIO) -> str:
    """Return `text` in red for a terminal that wants colours (https://no-color.org), else as it is."""
    wants = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[31m{text}\033[0m" if wants else text


def _in_options(message: str, options: Container[str]) -> str:
    """Return a message that names arguments of functions (`family=`) with the options of this command.

    Args:
        options: the names of the command's options.
    """
    for argument in ("weight_name", "subfolder"):
        if argument not in options:
            # A command that reads several adapters takes a path for each.
            message = message.replace(f"pass {argument}= with one of", "pass the path of one of")
    known = re.compile(r"\b(family|weight_name|subfolder|rank|energy|density)=(?=[\s,;)]|$)")
    return known.sub(lambda found: f"--{found[1]}" if found[1] in options else found[0], message)
