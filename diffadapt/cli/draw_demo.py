"""`diffadapt demo`: load adapters into the embedded pipeline and draw a picture."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--pipeline", default=None, help="folder of the embedded pipeline (default: this checkout's)")
    parser.add_argument("--output", default="demo.png", help="PNG file to write (default: %(default)s)")


def _run(options: Namespace) -> Result:
    from diffadapt.demo import run

    run(options.pipeline, options.output)
    return Result("", {"output": options.output})


DEMO = Command("demo", "load adapters into the embedded pipeline and draw a picture", _add_options, _run)
