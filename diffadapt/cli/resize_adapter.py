"""`diffadapt resize`: write an adapter as a LoRA of a smaller rank."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, add_models, models_arguments


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", help="adapter file, folder or hub id")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--rank", type=int, help="largest rank of a layer")
    parser.add_argument("--energy", type=float, help="share of each layer's change to keep, in (0, 1]")
    parser.add_argument("--to", default="diffusers", metavar="FORMAT", help="format to write (default: %(default)s)")
    add_models(parser)


def _run(options: Namespace) -> None:
    from diffadapt.on_disk.derived_loras import resize

    limits = {"rank": options.rank, "energy": options.energy}
    print(resize(options.file, options.output, format=options.to, **limits, **models_arguments(options)))


RESIZE = Command("resize", "write an adapter as a LoRA of a smaller rank", _add_options, _run)
