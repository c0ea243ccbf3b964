"""`diffadapt combine`: write one LoRA made from several adapters."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result, add_models, conversion_as_json, models_arguments, with_strength

_METHODS = ("svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="adapter file, folder or hub id")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--method", choices=_METHODS, default="svd", help="how to combine (default: %(default)s)")
    parser.add_argument("--rank", type=int, help="largest rank of a layer (default: that of the adapters)")
    parser.add_argument("--energy", type=float, help="share of each layer's change to keep, in (0, 1]")
    parser.add_argument("--density", type=float, help="share of the elements to keep, for ties, dare and pruning")
    parser.add_argument("--to", default="diffusers", metavar="FORMAT", help="format to write (default: %(default)s)")
    add_models(parser)


def _run(options: Namespace) -> Result:
    from diffadapt.on_disk.derived_loras import combine_files
    from diffadapt.to_lora.combine import Combination

    combination = Combination(options.method, density=options.density, rank=options.rank, energy=options.energy)
    adapters = [with_strength(text) for text in options.adapters]
    done = combine_files(adapters, options.output, combination, format=options.to, **models_arguments(options))
    return Result(str(done), {"output": options.output, "format": options.to, **conversion_as_json(done)})


COMBINE = Command("combine", "write one LoRA made from several adapters", _add_options, _run)
