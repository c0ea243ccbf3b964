"""`diffadapt train`: train an adapter, with options from a config file and the command line."""

from argparse import ArgumentParser, Namespace

from diffadapt.cli.command import Command, Result
from diffadapt.training.option_sources import add_options, options_from


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="TOML file with options; those of the command line take precedence")
    add_options(parser)


def _run(options: Namespace) -> Result:
    chosen = options_from(options.config, vars(options))
    from diffadapt.training.run import train

    # The trainer itself says what it does.
    return Result("", {"output": str(train(chosen)), "dry_run": chosen.dry_run})


TRAIN = Command("train", "train an adapter: diffadapt train config.toml [--option value]", _add_options, _run)
