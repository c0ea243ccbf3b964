"""Give the pipeline classes of diffusers the names `load_adapter` and `adapters`."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from diffadapt.pipelines.base_classes import PIPELINE_CLASSES


def install() -> None:
    """Give `DiffusionPipeline` and `ModularPipeline` the names `load_adapter` and `adapters`.

    Pipelines take a second to import, so classes that are not imported yet get the names when they are.
    """
    waiting = {module: owner for module, owner in PIPELINE_CLASSES.items() if module not in sys.modules}
    for module, owner in PIPELINE_CLASSES.items():
        if module not in waiting:
            _extend(getattr(sys.modules[module], owner))
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


def _extend(owner: type) -> None:
    """Give a pipeline class the two names; warn about those that it has already, and leave them as they are."""
    # Whoever imports a pipeline waits for torch anyway.
    from diffadapt.pipelines.entry import adapters_of, load_adapter

    for name, value in (("load_adapter", load_adapter), ("adapters", property(adapters_of))):
        existing = vars(owner).get(name)
        if getattr(owner, name, None) is None:
            setattr(owner, name, value)
        elif existing is not load_adapter and getattr(existing, "fget", None) is not adapters_of:
            warnings.warn(
                f"{owner.__name__} has a {name!r} of its own in this version of diffusers, which stays as it is; "
                f"use diffadapt.{'adapters(pipe)' if name == 'adapters' else 'load_adapter(pipe, ...)'}",
                stacklevel=2,
            )


def _serve_adapted_models() -> None:
    """Let diffusers' adapter methods serve models that got adapters before their pipelines were imported."""
    from diffadapt.pipelines.entry import adapters_of
    from diffadapt.pipelines.served_classes import serve_diffusers_methods

    serve_diffusers_methods(adapters_of)


class _Finder(importlib.abc.MetaPathFinder):
    """An import hook that calls `_extend` on pipeline classes once their modules are imported, and then removes itself.

    Attributes:
        waiting: module name -> class name, for modules that are not imported yet.
    """

    def __init__(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        owner = self.waiting.pop(fullname, None)
        if owner is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend(getattr(module, owner))
                _serve_adapted_models()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
