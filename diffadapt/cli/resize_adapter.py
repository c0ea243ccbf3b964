"""`diffadapt resize`: write an adapter as a LoRA of a smaller rank."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result, add_models, conversion_as_json, models_arguments


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", help="adapter file, folder or hub id")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--rank", type=int, help="largest rank of a layer")
    parser.add_argument("--energy", type=float, help="share of each layer's change to keep, in (0, 1]")
    parser.add_argument("--to", default="diffusers", metavar="FORMAT", help="format to write (default: %(default)s)")
    add_models(parser)


def _run(options: Namespace) -> Result:
    from diffadapt.on_disk.derived_loras import resize

    limits = {"rank": options.rank, "energy": options.energy}
    done = resize(options.file, options.output, format=options.to, **limits, **models_arguments(options))
    return Result(str(done), {"output": options.output, "format": options.to, **conversion_as_json(done)})


RESIZE = Command("resize", "write an adapter as a LoRA of a smaller rank", _add_options, _run)
