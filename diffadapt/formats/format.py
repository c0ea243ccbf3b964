"""What a file format is: a record of functions that assign every key of a file to its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict


@dataclass(frozen=True)
class Header:
    """A file without the values of its tensors.

    Attributes:
        keys: the names of the tensors.
        metadata: the safetensors metadata.
        config: the content of the `adapter_config.json` next to the file, if there is one.
        shapes: shape of a tensor by key; empty if unknown.
    """

    keys: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Any] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


Settings: TypeAlias = Callable[[str, str, str], Mapping[str, float]]
"""`(component, path as written, name of the adapter type) -> settings of the type` according to a file's metadata."""


def _no_settings(header: Header) -> Settings:
    return lambda component, path, type: {}


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: the name in reports and in `save(format=...)`.
        matches: whether a file has keys of this format; `formats.matching` decides which formats are asked first.
        locate: returns a verdict for every key.
        dump: returns what to write for an adapter, by subfolder; `None` if the format is read-only. Raises
            `AdapterError` for content that the format cannot express.
        settings: returns the settings of adapter types that the metadata contains, besides alphas, which all formats
            have in common (`header_alpha.py`).
        original: whether files of a family in this format use the original layout of its models.
    """

    name: str
    matches: Callable[[Header], bool]
    locate: Callable[[Header, Names], dict[str, Verdict]]
    dump: Callable[[AdapterState], dict[str, Document]] | None = None
    settings: Callable[[Header], Settings] = _no_settings
    original: Callable[[str | None], bool] = lambda family: False
