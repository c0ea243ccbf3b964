"""`diffadapt extract`: write the LoRA between a model and its finetuned version."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result, add_models, conversion_as_json, faults_as_json, models_arguments


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="the model: a safetensors file, or a folder of a pipeline or of one component")
    parser.add_argument("tuned", help="the finetuned model, in any layout and dtype")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--rank", type=int, help="largest rank of a layer")
    parser.add_argument("--energy", type=float, help="share of each layer's change to keep, in (0, 1]")
    parser.add_argument("--to", metavar="FORMAT", help="format to write (default: diffusers, or kohya if norms differ)")
    add_models(parser)


def _run(options: Namespace) -> Result:
    from diffadapt.on_disk.extraction import extract

    done = extract(
        options.base,
        options.tuned,
        options.output,
        rank=options.rank,
        energy=options.energy,
        format=options.to,
        **models_arguments(options),
    )
    account = {**conversion_as_json(done.conversion), "left_out": faults_as_json(done.left_out)}
    return Result(str(done), {"output": options.output, "format": options.to or done.format, **account})


EXTRACT = Command("extract", "write the LoRA between a model and its finetuned version", _add_options, _run)
