"""Real files, known by their names and shapes only, on the published models; and files that are not adapters."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from diffadapt import AdapterError, families, inspect
from diffadapt.families.published import published
from diffadapt.formats import detect
from diffadapt.formats.format import Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused
from diffadapt.runtime.targets import Targets
from tests.support.files import shapes_of
from tests.support.judge import reason


@dataclass(frozen=True)
class Listed:
    """What becomes of a real file's tensors on the published models.

    Attributes:
        name: The name of the list.
        kind: How much of the file is known, as the list states.
        tensors: The number of tensors.
        format: The name of the recognised format.
        family: The recognised family, or "".
        used: The number of tensors that are used, or, without shapes, whose layer is found; `None` without such models.
        reason: Why the first of the others is not used.
        by_name: The shapes are unknown.
    """

    name: str
    kind: str
    tensors: int
    format: str
    family: str
    used: int | None
    reason: str = ""
    by_name: bool = False


@cache
def published_models(family: str) -> list[dict[str, nn.Module]]:
    """Return the published models of a family without weights, built once. They must not be changed."""
    return list(published(family))


def listed(file: Path) -> Listed:
    """Inspect a list of keys and shapes on models without weights."""
    content = json.loads(file.read_text())
    shapes = shapes_of(content)
    known = {key: shape for key, shape in shapes.items() if shape is not None}
    header = Header(tuple(shapes), content.get("metadata") or {}, None, known)
    format = detect(header).name
    family = families.of_file((key, known.get(key, ())) for key in shapes) or ""
    found = Listed(file.stem, content.get("kind", ""), len(shapes), format, family, None)
    if not family:
        return replace(found, reason="its names alone do not tell for which models it is")
    try:
        candidates = published_models(family)
    except AdapterError as error:
        return replace(found, reason=reason(error))
    # Like `convert`, choose the model of the family that has most of the file's layers.
    return max((_listed_on(on, found, shapes, header) for on in candidates), key=lambda listed: listed.used or 0)


def _listed_on(
    on: Mapping[str, nn.Module], found: Listed, shapes: Mapping[str, tuple[int, ...] | None], header: Header
) -> Listed:
    if any(shape is None for shape in shapes.values()):
        verdicts = detect(header).locate(header, Names({name: Targets(model) for name, model in on.items()}))
        missed = [verdict.reason for verdict in verdicts.values() if isinstance(verdict, Unused)]
        return replace(found, used=len(shapes) - len(missed), reason=missed[0] if missed else "", by_name=True)
    # Alphas need values, since they are read with the names.
    tensors = {
        key: torch.empty(shape, device="meta") if shape else torch.tensor(4.0)
        for key, shape in shapes.items()
        if shape is not None
    }
    report = inspect(tensors, on)
    return replace(found, used=report.used, reason=report.unused[0][1] if report.unused else "")


# Files that are not adapters

FOREIGN: dict[str, tuple[str, ...]] = {
    "IP-Adapter": ("image_proj.proj.0.weight", "ip_adapter.1.to_k_ip.weight"),
    "IP-Adapter of XLabs": ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",),
    "ControlNet-LLLite": ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",),
}


def refusal(keys: Sequence[str]) -> tuple[str, str]:
    """Return the name of the format that recognises a file with these keys, and the message of its refusal."""
    header = Header(tuple(keys))
    format = detect(header)
    try:
        format.locate(header, Names(None))
    except AdapterError as error:
        return format.name, str(error)
    return format.name, ""
