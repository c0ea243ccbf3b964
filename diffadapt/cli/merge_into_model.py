"""`diffadapt merge`: write a model with adapters merged into its weights."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result, add_models, models_arguments, with_strength


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="the model: a safetensors file, or a folder of a pipeline or of one component")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[:STRENGTH]", help="adapter file, folder or hub id")
    parser.add_argument("output", help="file to write for a file, folder to make for a folder")
    add_models(parser)


def _run(options: Namespace) -> Result:
    from diffadapt.on_disk.merged_models import merge_files

    adapters = [with_strength(text) for text in options.adapters]
    written = merge_files(options.base, adapters, options.output, **models_arguments(options))
    merged = [{"adapter": source, "strength": strength} for source, strength in adapters]
    return Result(str(written), {"output": str(written), "adapters": merged})


MERGE = Command("merge", "write a model with adapters merged into its weights", _add_options, _run)
