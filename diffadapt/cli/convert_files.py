"""`diffadapt convert`: write an adapter file in another format."""

import json
from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, add_source, source_arguments


def _add_options(parser: ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("output", help="file or folder to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="format to write: diffusers, kohya, peft, ...")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def _run(options: Namespace) -> None:
    from diffadapt.loading.conversion import convert
    from diffadapt.pipelines.saved import models_of

    target = None if options.pipeline is None else models_of(options.pipeline)
    written = convert(options.file, options.output, options.to, models=target, **source_arguments(options))
    print(json.dumps({"output": str(written), "format": options.to}) if options.json else written)


CONVERT = Command("convert", "write an adapter file in another format", _add_options, _run)
