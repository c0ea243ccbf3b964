"""`diffadapt merge`: write a model with adapters merged into its weights."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, add_models, models_arguments, with_strength


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="the model: a safetensors file, or a folder of a pipeline or of one component")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[:STRENGTH]", help="adapter file, folder or hub id")
    parser.add_argument("output", help="file to write for a file, folder to make for a folder")
    add_models(parser)


def _run(options: Namespace) -> None:
    from diffadapt.on_disk.merged_models import merge_files

    adapters = [with_strength(text) for text in options.adapters]
    print(merge_files(options.base, adapters, options.output, **models_arguments(options)))


MERGE = Command("merge", "write a model with adapters merged into its weights", _add_options, _run)
