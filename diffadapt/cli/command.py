"""What every command of `diffadapt` has in common: its form, and the options that say which file is meant."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a command has done.

    Attributes:
        text: what is printed for people; empty for nothing.
        data: what `--json` prints, in the types of JSON.
    """

    text: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """A command of `diffadapt`.

    Attributes:
        name: the word on the command line.
        help: one line for the list of commands.
        add_options: declares the options.
        run: does the work and returns what is printed. It imports what it needs itself, so that the help does not wait
            for torch.
    """

    name: str
    help: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Result]


def add_source(parser: ArgumentParser) -> None:
    """Add the options that say which file is meant, and for which models."""
    parser.add_argument("file", help="adapter file, folder or hub id")
    parser.add_argument("--weight_name", help="name of the file in a folder or hub repository with several")
    parser.add_argument("--subfolder", help="folder of the file in a folder or hub repository")
    add_models(parser)


def add_models(parser: ArgumentParser) -> None:
    """Add the options that say for which models a file is, if its names do not tell."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--family", help="family of the models, if the tensor names do not tell: sdxl, flux, ...")
    models.add_argument(
        "--pipeline", metavar="FOLDER", help="saved pipeline with the same models; only its configs are read"
    )


def models_arguments(options: Namespace) -> dict[str, Any]:
    """Return the options of `add_models` as the arguments `family` and `models`."""
    from diffadapt.pipelines.saved import models_of

    return {"family": options.family, "models": None if options.pipeline is None else models_of(options.pipeline)}


def with_strength(text: str) -> tuple[str, float]:
    """Return the source and the strength in `FILE` or `FILE:STRENGTH`; the strength defaults to 1."""
    source, colon, number = text.rpartition(":")
    try:
        return (source, float(number)) if colon and source else (text, 1.0)
    except ValueError:
        return text, 1.0


def source_arguments(options: Namespace) -> dict[str, Any]:
    """Return the options of `add_source`, apart from the file itself, as arguments of `convert`."""
    return {"weight_name": options.weight_name, "subfolder": options.subfolder, **models_arguments(options)}


def report_as_json(report: Any) -> dict[str, Any]:
    """Return a `Report` in the types of JSON."""
    fields = ("name", "format", "family", "types", "components", "tokens", "used", "metadata")
    found: dict[str, Any] = {name: getattr(report, name) for name in fields}
    found["scales"] = {name: str(scales) for name, scales in report.scales.items()}
    for name in ("unused", "notes"):
        found[name] = faults_as_json(getattr(report, name))
    return found


def conversion_as_json(conversion: Any) -> dict[str, Any]:
    """Return a `Conversion` in the types of JSON."""
    layers = [asdict(layer) for layer in conversion.layers]
    return {"exact": conversion.exact, "error": conversion.error, "layers": layers}


def faults_as_json(faults: Iterable[Any]) -> list[dict[str, str]]:
    """Return faults in the types of JSON."""
    return [{"key": fault.key, "reason": fault.reason} for fault in faults]
