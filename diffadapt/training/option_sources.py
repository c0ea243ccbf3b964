"""Read the options of a run from a config file and the command line."""

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffadapt.errors import UsageError
from diffadapt.training.options import FolderOptions, TrainingOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")
_MULTIPLE = (list, dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of a run to a parser. Options that are not given leave no attribute."""
    sections = [kind for kind in reversed(TrainingOptions.__mro__) if dataclasses.is_dataclass(kind)]
    seen: set[str] = set()
    for section in sections:
        group = parser.add_argument_group((section.__doc__ or "").splitlines()[0].rstrip("."))
        for entry in dataclasses.fields(section):
            if entry.name in seen:
                continue
            seen.add(entry.name)
            names = [f"--{entry.name}", *entry.metadata["aliases"]]
            kind, choices = _type_of(entry)
            arguments: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS, "help": _help(entry)}
            if choices:
                arguments |= {"choices": choices}
            elif kind is bool:
                arguments |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
            elif kind in _MULTIPLE:
                arguments |= {"nargs": "*", "metavar": "VALUE" if kind is list else "NAME=VALUE"}
            else:
                arguments |= {"type": kind, "metavar": kind.__name__.upper()}
            group.add_argument(*names, **arguments)


def options_from(config: str | Path | None, given: Mapping[str, Any]) -> TrainingOptions:
    """Return the options of a config file, overridden by those given on the command line.

    Raises:
        UsageError: the file cannot be read, or has a key or a value that no option takes.
    """
    values = {} if config is None else read_config(Path(config))
    for entry in dataclasses.fields(TrainingOptions):
        if entry.name in given:
            values[entry.name] = _from_command_line(entry, given[entry.name])
    return TrainingOptions(**values)


def read_config(path: Path) -> dict[str, Any]:
    """Return the options in a TOML file. Tables other than those of options only group keys.

    Relative paths in the file are relative to its folder.

    Raises:
        UsageError: the file cannot be read, or has a key or a value that no option takes.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
        table = tomllib.loads(content)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the config file cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not a TOML file: {error}") from error
    fields = {entry.name: entry for entry in dataclasses.fields(TrainingOptions)}
    values: dict[str, Any] = {}
    for name, value in _flat(table, fields).items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {close[0]}?" if close else "; diffadapt train --help lists all"
            raise UsageError(f"{path}: there is no option {name}{hint}")
        value = _checked(f"{path}: {name}", fields[name], value)
        kind = fields[name].metadata["path"]
        values[name] = _beside(path.parent, value, kind) if kind else value
        if name == "folders":
            values[name] = [_folder(path, table) for table in value]
    return values


def _flat(table: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config with those of grouping tables moved to the top."""
    values: dict[str, Any] = {}
    for name, value in table.items():
        inner = value if isinstance(value, dict) and name not in fields else {name: value}
        for key, content in inner.items():
            if key in values:
                raise UsageError(f"the config file sets {key} twice")
            values[key] = content
    return values


def _folder(config: Path, table: Any) -> FolderOptions:
    fields = {entry.name: entry for entry in dataclasses.fields(FolderOptions)}
    if not isinstance(table, dict) or "path" not in table:
        raise UsageError(f"{config}: folders has to be a list of tables, each with a path")
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in fields:
            raise UsageError(f"{config}: a folder has no option {name}; it has {', '.join(fields)}")
        value = _checked(f"{config}: folders: {name}", fields[name], value)
        values[name] = _beside(config.parent, value, "always") if name in ("path", "control") else value
    return FolderOptions(**values)


def _beside(folder: Path, value: str, kind: str) -> str:
    """Return a path of a config file relative to its folder; if it is `perhaps` none, only if it exists there."""
    beside = folder / Path(value).expanduser()
    if kind == "always":
        return str(beside)
    try:
        return str(beside) if beside.exists() else value
    except OSError:  # A prompt may be too long for a file name.
        return value


def check_kinds(options: TrainingOptions) -> None:
    """Raise `UsageError` if an option, set in Python, is a value of another kind than a config file may give it."""
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        kind, choices = _type_of(entry)
        is_path = kind is str and isinstance(value, os.PathLike)
        if (value is not None or entry.default is not None) and (choices or kind in _SCALARS) and not is_path:
            _checked(entry.name, entry, value)


def _type_of(entry: dataclasses.Field[Any]) -> tuple[type, tuple[str, ...]]:
    """Return the type of an option, without `None`, and its choices."""
    kind: Any = entry.type
    if isinstance(kind, str):
        kind = typing.get_type_hints(TrainingOptions)[entry.name]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return str, typing.get_args(kind)
    return typing.get_origin(kind) or kind, ()


def _checked(where: str, entry: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value of a config file in the type of its option."""
    kind, choices = _type_of(entry)
    if choices:
        if value not in choices:
            raise UsageError(f"{where} is {value!r}, expected one of {', '.join(choices)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UsageError(f"{where} is {value!r}, expected {_NAMES[kind]}")
    return value


def _from_command_line(entry: dataclasses.Field[Any], value: Any) -> Any:
    kind, _ = _type_of(entry)
    if entry.name == "folders":
        tables = (_toml_value(text) for text in value)
        return [FolderOptions(**(table if isinstance(table, dict) else {"path": table})) for table in tables]
    if kind is dict:
        pairs = [text.partition("=") for text in value]
        for name, equals, _ in pairs:
            if not equals:
                raise UsageError(f"--{entry.name} {name}: expected name=value")
        return {name: _toml_value(text) for name, _, text in pairs}
    return value


def _toml_value(text: str) -> Any:
    """Return a value as it would be read in a config file; what is no such value is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        lowered = text.lower()
        if lowered in ("true", "false"):
            return lowered == "true"
        if "," in text:
            return [_toml_value(part.strip()) for part in text.split(",")]
        try:
            return float(text)
        except ValueError:
            return text


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in _TRUE


def _help(entry: dataclasses.Field[Any]) -> str:
    text = str(entry.metadata["help"]).replace("%", "%%")
    default = None if entry.default is dataclasses.MISSING else entry.default
    return text if default in (None, "", False) else f"{text} (default: {default})"


_SCALARS = (bool, int, float, str)
_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def arguments_of(argv: Sequence[str] | None, parser: argparse.ArgumentParser) -> tuple[str | None, dict[str, Any]]:
    """Parse a command line of `add_options` with an optional config file first; return the file and the options."""
    found = vars(parser.parse_args(argv))
    return found.pop("config", None), found
