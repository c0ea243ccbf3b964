"""Tensors that a file leaves out: they follow from a seed, from base weights or from the other layers of the file."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.loading.content import Content, Group
from diffadapt.loading.fit import Fitted
from diffadapt.runtime.base_weight import bias_of, weight_of
from diffadapt.runtime.targets import Targets
from diffadapt.types.adapter_type import AdapterType, Unfinished


def complete(fitted: Fitted, targets: Mapping[str, Targets] | None, *, for_writing: bool) -> Fitted:
    """Return the layers of a file with the tensors that `AdapterType.complete` adds; see there.

    Args:
        targets: the models' paths, by component; `None` if there is no model.
        for_writing: whether the tensors are to be written into a file, so that tensors without values are a fault.
    """
    pending: dict[tuple[str, str], dict[str, tuple[Group, Content]]] = {}
    for group, contents in fitted.layers:
        for content in contents:
            if not content.adapter_type.is_complete:
                key = content.component, content.adapter_type.name
                pending.setdefault(key, {})[content.path] = group, content
    done: dict[int, Content] = {}
    broken: set[int] = set()
    for (component, _), layers in pending.items():
        modules = None if targets is None else targets[component]
        try:
            done |= _completed([content for _, content in layers.values()], modules, for_writing=for_writing)
        except AdapterError as error:
            for group, _ in layers.values():
                broken.add(id(group))
                fitted.faults.extend(group.faults(error))
    remaining = [
        (group, [done.get(id(content), content) for content in contents])
        for group, contents in fitted.layers
        if id(group) not in broken
    ]
    return replace(fitted, layers=remaining)


def _completed(contents: list[Content], targets: Targets | None, *, for_writing: bool) -> dict[int, Content]:
    """Return the completed contents of one type and component, by the `id` of the incomplete ones."""
    adapter_type: AdapterType = contents[0].adapter_type
    order = {} if targets is None else {path: number for number, path in enumerate(targets.modules)}
    by_path = {content.path: content for content in sorted(contents, key=lambda found: order.get(found.path, 0))}
    found = adapter_type.complete(
        {
            path: Unfinished(
                content.tensors,
                content.spec,
                {**adapter_type.settings, **content.settings},
                partial(_weight, targets, content),
                partial(_bias, targets, content),
            )
            for path, content in by_path.items()
        }
    )
    if for_writing:
        for path, content in by_path.items():
            absent = sorted(name for name, tensor in found[path].items() if tensor.is_meta)
            if absent and not any(tensor.is_meta for tensor in content.tensors.values()):
                raise AdapterError(
                    f"{', '.join(absent)} follow from the weights of the model; load the adapter into a pipeline and "
                    "save it there"
                )
    return {id(content): replace(content, tensors=found[path]) for path, content in by_path.items()}


def _weight(targets: Targets | None, content: Content) -> Tensor:
    """Return the base weight of a layer of the file, of all its parts together; without a model, one of no values."""
    spec = content.spec
    if targets is None or not all(path in targets.modules for path in content.paths):
        return torch.empty(spec.weight_shape, device="meta")
    if not content.parts:
        return weight_of(targets.modules[content.path], spec)
    own = [targets.spec(path, content.adapter_type.layers) for path in content.paths]
    weights = [weight_of(targets.modules[path], one) for path, one in zip(content.paths, own, strict=True)]
    return _joined(content, weights)


def _bias(targets: Targets | None, content: Content) -> Tensor | None:
    """Return the base bias of a layer of the file, of all its parts together; `None` without a bias or a model."""
    if targets is None or not all(path in targets.modules for path in content.paths):
        return None
    found = [bias_of(targets.modules[path]) for path in content.paths]
    if any(bias is None for bias in found):
        return None
    biases = [bias.detach() for bias in found if bias is not None]
    return _joined(content, biases) if content.parts else biases[0]


def _joined(content: Content, parts: list[Tensor]) -> Tensor:
    """Return the rows of all parts in the order of the file."""
    total = torch.empty(content.spec.out_features, *parts[0].shape[1:], dtype=parts[0].dtype, device=parts[0].device)
    start = 0
    for part, own in zip(content.parts, parts, strict=True):
        taken = 0
        for rows in part.rows(start, len(own)):
            total[rows.start : rows.stop] = own[taken : taken + len(rows)]
            taken += len(rows)
        start += len(own)
    return total
