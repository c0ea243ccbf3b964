"""What `load_adapter` and `inspect` say about a file: every tensor used, or why not."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 10


@dataclass(frozen=True)
class Report:
    """The account of one file.

    Attributes:
        name: the adapter's name.
        format: file format ("diffusers", "kohya", "peft", "comfy", ...).
        family: model family ("sd", "sdxl", "flux", ...), `None` where unknown.
        types: layers per adapter type.
        components: layers per component.
        tokens: words for the prompt that the file brings (textual inversions), with their numbers of vectors. A
            pipeline that does not spell out a token of several vectors needs all: `token token_1 token_2`.
        used: number of tensors of the file that are in use.
        unused: `(key, reason)` for every other tensor.
        metadata: safetensors header metadata, verbatim.
    """

    name: str
    format: str
    family: str | None
    types: Mapping[str, int]
    components: Mapping[str, int]
    used: int
    unused: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
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


def explained(faults: list[tuple[str, str]]) -> list[str]:
    """Faults as lines, those with a common reason together, the most frequent first."""
    by_reason = Counter(reason for _, reason in faults)
    lines: list[str] = []
    for reason, count in by_reason.most_common(_SHOWN):
        keys = [key for key, why in faults if why == reason]
        more = f" (and {count - 1} more)" if count > 1 else ""
        lines.append(f"{keys[0]}{more}: {reason}")
    hidden = len(by_reason) - _SHOWN
    return [*lines, f"... and {hidden} more reasons"] if hidden > 0 else lines


def _counted(counts: Mapping[str, int], unit: str) -> str:
    return ", ".join(f"{name} {count} {unit}" for name, count in counts.items()) or "none"


def _listed(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{token} ({count} vectors)" if count > 1 else token for token, count in tokens.items())
