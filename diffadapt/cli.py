"""The `diffadapt` command.

Its exit status is 0 after success, 1 after an error in what was asked for, 2 after wrong options, and 130 after Ctrl-C.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import diffadapt
from diffadapt.errors import AdapterError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; without a command, print the help.

    Args:
        arguments: command line arguments; defaults to those of the process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        {"inspect": _inspect, "convert": _convert, "demo": _demo}[options.command](options)
    except (AdapterError, OSError) as error:
        print(f"diffadapt: {_in_options(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffadapt",
        description="Adapters for diffusers pipelines.",
        epilog="Exit status: 0 after success, 1 after an error, 2 after wrong options.",
    )
    parser.add_argument("--version", action="version", version=f"diffadapt {diffadapt.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="explain an adapter file without loading it")
    _add_source(inspect)
    inspect.add_argument("--metadata", action="store_true", help="also print the file's metadata")
    inspect.add_argument("--json", action="store_true", help="print the report as JSON, with the metadata")
    convert = commands.add_parser("convert", help="write an adapter file in another format")
    _add_source(convert)
    convert.add_argument("output", help="file or folder to write")
    convert.add_argument("--to", required=True, metavar="FORMAT", help="format to write: diffusers, kohya, peft, ...")
    demo = commands.add_parser("demo", help="load adapters into the embedded pipeline and draw a picture")
    demo.add_argument("--pipeline", default=None, help="folder of the embedded pipeline (default: this checkout's)")
    demo.add_argument("--output", default="demo.png", help="PNG file to write (default: %(default)s)")
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which file is meant, and for which models."""
    parser.add_argument("file", help="adapter file, folder or hub id")
    parser.add_argument("--weight_name", help="name of the file in a folder or hub repository with several")
    parser.add_argument("--subfolder", help="folder of the file in a folder or hub repository")
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--family", help="family of its models, if the tensor names do not tell: sdxl, flux, ...")
    models.add_argument(
        "--pipeline", metavar="FOLDER", help="saved pipeline that the file is for; only configs are read"
    )


def _inspect(options: argparse.Namespace) -> None:
    from diffadapt.pipelines.inspection import inspect
    from diffadapt.pipelines.saved import models_of

    target = None if options.pipeline is None else models_of(options.pipeline)
    report = inspect(options.file, target, **_source(options))
    if options.json:
        print(json.dumps(_plain(report), indent=2, ensure_ascii=False))
        return
    print(report)
    if options.metadata:
        for key, value in report.metadata.items():
            print(f"  {key} = {value}")


def _convert(options: argparse.Namespace) -> None:
    from diffadapt.loading.conversion import convert
    from diffadapt.pipelines.saved import models_of

    target = None if options.pipeline is None else models_of(options.pipeline)
    print(convert(options.file, options.output, options.to, models=target, **_source(options)))


def _demo(options: argparse.Namespace) -> None:
    from diffadapt.demo import run

    run(options.pipeline, options.output)


def _source(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("family", "weight_name", "subfolder")}


def _plain(report: Any) -> dict[str, Any]:
    """Return a report as JSON can hold it."""
    fields = ("name", "format", "family", "types", "components", "tokens", "used", "metadata")
    found: dict[str, Any] = {name: getattr(report, name) for name in fields}
    found["scales"] = {name: str(scales) for name, scales in report.scales.items()}
    for name in ("unused", "notes"):
        found[name] = [{"key": fault.key, "reason": fault.reason} for fault in getattr(report, name)]
    return found


def _in_options(message: str) -> str:
    """Return a message that names arguments of functions (`family=`) with the options of this command."""
    return re.sub(r"\b(family|weight_name|subfolder)=(?=[\s,;)]|$)", r"--\1", message)
