"""The `diffadapt` command."""

import argparse
import sys
from collections.abc import Sequence

from diffadapt.errors import AdapterError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 1 after an `AdapterError`.

    Args:
        arguments: command line arguments; defaults to those of the process.
    """
    parser = argparse.ArgumentParser(prog="diffadapt", description="Adapters for diffusers pipelines.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="explain an adapter file without loading it")
    inspect.add_argument("file", help="adapter file, folder or hub id")
    inspect.add_argument("--metadata", action="store_true", help="also print the file's metadata")
    convert = commands.add_parser("convert", help="write an adapter file in another format")
    convert.add_argument("file", help="adapter file, folder or hub id")
    convert.add_argument("output", help="file or folder to write")
    convert.add_argument("--to", required=True, metavar="FORMAT", help="format to write: diffusers, kohya, peft, ...")
    convert.add_argument("--family", help="family of its models, if the tensor names do not tell: sdxl, flux, ...")
    demo = commands.add_parser("demo", help="load adapters into the embedded pipeline and draw a picture")
    demo.add_argument("--pipeline", default=None, help="folder of the embedded pipeline (default: this checkout's)")
    demo.add_argument("--output", default="demo.png", help="PNG file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        return {"inspect": _inspect, "convert": _convert, "demo": _demo}[options.command](options)
    except AdapterError as error:
        print(f"diffadapt: {error}", file=sys.stderr)
        return 1


def _inspect(options: argparse.Namespace) -> int:
    from diffadapt.pipelines.inspection import inspect

    report = inspect(options.file)
    print(report)
    if options.metadata:
        for key, value in report.metadata.items():
            print(f"  {key} = {value}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from diffadapt.loading.conversion import convert

    print(convert(options.file, options.output, options.to, family=options.family))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from diffadapt.demo import run

    run(options.pipeline, options.output)
    return 0
