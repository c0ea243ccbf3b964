"""What a format is: a record of functions that say where each name of a file belongs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict


@dataclass(frozen=True)
class Header:
    """A file without its tensors: names, safetensors metadata, and `adapter_config.json` where there is one.

    Attributes:
        shapes: of the tensors, by key; empty where nobody has looked.
    """

    keys: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Any] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


Alphas: TypeAlias = Callable[[str, str, int], float | None]
"""`(component, path as written, rank) -> alpha` from a file's metadata, `None` where it says nothing."""

Settings: TypeAlias = Callable[[str, str, str], Mapping[str, float]]
"""`(component, path as written, type name) -> settings of the type` that a file's metadata gives."""


def _no_settings(header: "Header") -> Settings:
    return lambda component, path, type: {}


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: as in reports and in `save(format=...)`.
        matches: whether a file has names of this format; see `formats.matching` for who is asked first.
        locate: a verdict for every key.
        alphas: the alphas that the metadata gives; an alpha tensor in the file wins over it.
        settings: the type's other numbers that the metadata gives.
        original: whether a family's files in this format are in the original layout of its models.
        dump: canonical form -> what to write, by subfolder; `None` if the format is only read. Raises
            `AdapterError` for content the format cannot express.
    """

    name: str
    matches: Callable[[Header], bool]
    locate: Callable[[Header, "Names"], dict[str, Verdict]]
    alphas: Callable[[Header], Alphas]
    dump: Callable[[AdapterState], dict[str, Document]] | None
    settings: Callable[[Header], Settings] = _no_settings
    original: Callable[[str | None], bool] = lambda family: False
