"""The report on a file that `load_adapter` and `inspect` return: what is used, and why the rest is not."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape

from diffadapt.errors import Fault
from diffadapt.loading.heat_map import HeatMap

_MOST_REASONS = 10


@dataclass(frozen=True)
class ScaleRange:
    """The scales (`alpha / rank`) of a file's adapter layers of one type.

    Attributes:
        least, most: the smallest and the largest of them.
        sources: where they come from -> the number of adapter layers: an alpha in a "tensor" or in the "header" of the
            file, or "none", which makes the scale 1.
    """

    least: float
    most: float
    sources: Mapping[str, int]

    @classmethod
    def of(cls, scales: Iterable[tuple[float, str]]) -> "ScaleRange":
        """Return the range of scales with their sources; there must be at least one."""
        values, sources = zip(*scales, strict=True)
        return cls(min(values), max(values), {name: sources.count(name) for name in _SOURCES if name in sources})

    def __str__(self) -> str:
        span = f"{self.least:g}" if self.least == self.most else f"{self.least:g} to {self.most:g}"
        mixed = len(self.sources) > 1
        sources = [f"{_SOURCES[name]} {count}" if mixed else _SOURCES[name] for name, count in self.sources.items()]
        return f"{span} ({', '.join(sources)})"


_SOURCES = {"tensor": "alpha tensors", "header": "alpha in the header", "none": "no alpha"}


@dataclass(frozen=True)
class Report:
    """The account of one file.

    Attributes:
        name: the adapter's name.
        format: the file format ("diffusers", "kohya", "peft", "comfy", ...).
        family: the model family ("sd", "sdxl", "flux", ...), or `None` if it is unknown.
        types: the number of adapter layers of each adapter type.
        components: the number of adapter layers in each component.
        used: the number of tensors that are used.
        unused: `(key, reason)` for every other tensor of the file.
        metadata: the metadata of the safetensors header, verbatim.
        tokens: the learned tokens of the file (textual inversions) and their numbers of vectors. A pipeline that does
            not spell out a token of several vectors needs all of its names in the prompt: `token token_1 token_2`.
        scales: the scales (`alpha / rank`) of the adapter layers of each adapter type.
        ranks: the ranks that occur in the adapter layers, ascending; empty for types without a rank.
        notes: `(layer, note)` for everything in which the file contradicts itself, and what was used.
        heat_map: returns where the adapter acts, for notebooks; `None` if its values were not read.
    """

    name: str
    format: str
    family: str | None
    types: Mapping[str, int]
    components: Mapping[str, int]
    used: int
    unused: list[Fault] = field(default_factory=list[Fault])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    scales: Mapping[str, ScaleRange] = field(default_factory=dict[str, ScaleRange])
    ranks: tuple[int, ...] = ()
    notes: list[Fault] = field(default_factory=list[Fault])
    heat_map: Callable[[], HeatMap | None] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        # A report outlives the models, and may be pickled without them.
        return {**self.__dict__, "heat_map": None}

    def __repr__(self) -> str:
        return (
            f"<Report on {self.name!r}: {self.format}, family {self.family or 'unknown'}, "
            f"{_counted(self.types, 'layers')}, {self.used} used, {len(self.unused)} unused>"
        )

    def __str__(self) -> str:
        lines = [f"{label:<11}{value}" for label, value in self._rows()]
        return "\n".join([*lines, *(f"  {line}" for line in explained([*self.unused, *self.notes]))])

    def _repr_html_(self) -> str:
        """Return the report for a notebook, with a map of where the adapter acts."""
        cells = "text-align:left;vertical-align:top"
        lines = [
            f"<tr><td style='{cells}'>{label}</td><td style='{cells}'>{escape(value)}</td></tr>"
            for label, value in self._rows()
        ]
        reasons = "".join(f"<li>{escape(line)}</li>" for line in explained([*self.unused, *self.notes]))
        found = None if self.heat_map is None else self.heat_map()
        listed = f"<ul>{reasons}</ul>" if reasons else ""
        return f"<table>{''.join(lines)}</table>{listed}{'' if found is None else found.html()}"

    def _rows(self) -> list[tuple[str, str]]:
        """Return the lines of the account, as labels and values."""
        scales = ", ".join(f"{name} {scales}" for name, scales in self.scales.items())
        return [
            ("adapter", self.name),
            ("format", f"{self.format}, family {self.family or 'unknown'}"),
            ("types", _counted(self.types, "layers")),
            *([("scales", scales)] if scales else []),
            ("components", _counted(self.components, "layers")),
            *([("tokens", _listed(self.tokens))] if self.tokens else []),
            ("tensors", f"{self.used} used, {len(self.unused)} unused"),
        ]


def explained(faults: list[Fault]) -> list[str]:
    """Return one line for each distinct reason, with the first key it applies to, the most frequent reasons first."""
    by_reason = Counter(fault.reason for fault in faults)
    lines: list[str] = []
    for reason, count in by_reason.most_common(_MOST_REASONS):
        key = next(fault.key for fault in faults if fault.reason == reason)
        more = f" (and {count - 1} more)" if count > 1 else ""
        lines.append(f"{key}{more}: {reason}")
    hidden = len(by_reason) - _MOST_REASONS
    return [*lines, f"... and {hidden} more reasons"] if hidden > 0 else lines


def _counted(counts: Mapping[str, int], unit: str) -> str:
    return ", ".join(f"{name} {count} {unit}" for name, count in counts.items()) or "none"


def _listed(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{token} ({count} vectors)" if count > 1 else token for token, count in tokens.items())
