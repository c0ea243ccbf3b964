"""`diffadapt inspect`: explain an adapter file without loading it."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result, add_source, report_as_json, source_arguments


def _add_options(parser: ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--metadata", action="store_true", help="also print the file's metadata")
    parser.add_argument("--plot", metavar="PICTURE", help="draw where the adapter acts, by block and projection")


def _run(options: Namespace) -> Result:
    from diffadapt.pipelines.inspection import inspect

    arguments = source_arguments(options)
    models = arguments.pop("models")
    report = inspect(options.file, models, **arguments)
    if options.plot is not None:
        from diffadapt.on_disk.plots import plot_sizes

        plot_sizes(options.file, options.plot, models=models, **arguments)
    metadata = [f"  {key} = {value}" for key, value in report.metadata.items()] if options.metadata else []
    return Result("\n".join([str(report), *metadata]), report_as_json(report))


INSPECT = Command("inspect", "explain an adapter file without loading it", _add_options, _run)
