"""`diffadapt convert`: write an adapter file in another format."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result, add_source, source_arguments


def _add_options(parser: ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("output", help="file or folder to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="format to write: diffusers, kohya, peft, ...")


def _run(options: Namespace) -> Result:
    from diffadapt.loading.conversion import convert

    written = convert(options.file, options.output, options.to, **source_arguments(options))
    return Result(str(written), {"output": str(written), "format": options.to})


CONVERT = Command("convert", "write an adapter file in another format", _add_options, _run)
