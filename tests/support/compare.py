"""Comparison of outputs, and of everything in a pipeline that an adapter must not change."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that `actual` is finite and equals `expected` within `tolerance` times the largest value, or times 1."""
    assert actual.isfinite().all()
    expected = expected.detach()
    error = (actual.detach().double() - expected.double()).abs().max()
    assert error <= tolerance * max(1.0, float(expected.abs().max())), f"differ by {float(error):.3g}"


def assert_differs(actual: Tensor, base: Tensor, least: float = 1e-2) -> None:
    """Assert that two outputs differ, since an adapter without any effect would pass every other check."""
    assert actual.isfinite().all()
    assert (actual.detach().double() - base.detach().double()).abs().max() > least


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference relative to that of `expected`."""
    return float((found - expected).norm() / expected.norm())


def snapshot(owner: DiffusionPipeline | nn.Module) -> dict[str, Any]:
    """Return weights, buffers, module paths, classes, attribute names and hooks of every model."""
    taken: dict[str, Any] = {}
    for component, model in models_of(owner).items():
        for key, value in model.state_dict().items():
            taken[f"{component}.state.{key}"] = value.clone()
        for path, module in model.named_modules():
            hooks = [len(getattr(module, name)) for name in ("_forward_hooks", "_forward_pre_hooks")]
            taken[f"{component}.module.{path}"] = (type(module), sorted(vars(module)), hooks)
            for name, parameter in module.named_parameters(recurse=False):
                taken[f"{component}.parameter.{path}.{name}"] = (id(parameter), parameter.requires_grad)
    if isinstance(owner, DiffusionPipeline):
        taken["pipeline"] = (type(owner), sorted(vars(owner)))
    return taken


def assert_unchanged(owner: DiffusionPipeline | nn.Module, before: dict[str, Any]) -> None:
    """Assert that everything is what `snapshot` saw, bit for bit."""
    after = snapshot(owner)
    assert list(after) == list(before)
    changed = [key for key, value in after.items() if not _equal(value, before[key])]
    assert changed == []


def models_of(owner: DiffusionPipeline | nn.Module) -> dict[str, nn.Module]:
    if isinstance(owner, nn.Module):
        return {"model": owner}
    return {name: model for name, model in owner.components.items() if isinstance(model, nn.Module)}


def _equal(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor):
        return left == right
    # Compare bits, not values: NaN equals itself, and 0.0 differs from -0.0.
    is_alike = left.dtype == right.dtype and left.shape == right.shape
    return is_alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)))
