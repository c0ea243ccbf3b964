"""The report on a file that `load_adapter` and `inspect` return: what is used, and why the rest is not."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffadapt.errors import Fault

_MOST_REASONS = 10


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

    def __str__(self) -> str:
        rows = [
            ("adapter", self.name),
            ("format", f"{self.format}, family {self.family or 'unknown'}"),
            ("types", _counted(self.types, "layers")),
            ("components", _counted(self.components, "layers")),
            *([("tokens", _listed(self.tokens))] if self.tokens else []),
            ("tensors", f"{self.used} used, {len(self.unused)} unused"),
        ]
        lines = [f"{label:<11}{value}" for label, value in rows]
        return "\n".join([*lines, *(f"  {line}" for line in explained(self.unused))])


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
