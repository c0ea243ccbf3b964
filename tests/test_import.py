"""What `import diffadapt` does to the world, and which module may know of which."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, ModularPipeline

import diffadapt
import diffadapt.pipeline

PACKAGE = Path(diffadapt.__file__).parent
ADDED = {"load_adapter", "adapters"}


def run(script: str) -> str:
    """Run a script in a fresh interpreter, without caches of this one."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_import_adds_two_names_to_pipelines_and_touches_nothing_else() -> None:
    run(f"""
import sys, torch
from diffusers import DiffusionPipeline, ModularPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import PreTrainedModel
owners = (DiffusionPipeline, ModularPipeline)
classes = (*owners, StableDiffusionPipeline, UNet2DConditionModel, PreTrainedModel,
           torch.nn.Module, torch.nn.Linear, torch.nn.Conv2d)
before = [dict(vars(kind)) for kind in classes]
modules = {{name: dict(vars(module)) for name, module in list(sys.modules.items())}}
finders = list(sys.meta_path)
import diffadapt
for kind, names in zip(classes, before):
    after = dict(vars(kind))
    added = set(after) - set(names)
    assert added == ({ADDED!r} if kind in owners else set()), (kind, added)
    assert all(after[name] is names[name] for name in names if name != "__doc__"), kind
changed = [(name, key) for name, names in modules.items() if not name.startswith(("diffadapt", "__main__"))
           for key, value in names.items() if vars(sys.modules[name]).get(key) is not value]
assert changed == [], changed
assert sys.meta_path == finders
""")


@pytest.mark.slow
def test_names_are_there_when_pipelines_are_imported_later_and_peft_is_not_needed() -> None:
    """Without peft, on a pipeline that is imported after this library, with a per-call scale."""
    run("""
import importlib.machinery, sys

class WithoutPeft(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "peft" else super().find_spec(name, path, target)

sys.meta_path = [WithoutPeft if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import diffadapt
assert not any(name.startswith("diffusers.pipelines.") for name in sys.modules)
from diffusers import DiffusionPipeline, ModularPipeline
import diffusers.utils
assert not diffusers.utils.USE_PEFT_BACKEND
for kind in (DiffusionPipeline, ModularPipeline):
    assert callable(kind.load_adapter) and isinstance(kind.adapters, property)

import torch
from tests import files, models
torch.set_num_threads(1)
pipe = models.sd15()
base = models.draw(pipe)
pipe.load_adapter(files.peft_names(files.parts_for(pipe)), "a")
halved = models.draw(pipe, cross_attention_kwargs={"scale": 0.5})
pipe.adapters.activate({"a": 0.5})
expected = models.draw(pipe)
assert (halved - expected).abs().max() < 1e-5 < (halved - base).abs().max()
assert not any(name == "peft" or name.startswith("peft.") for name in sys.modules)
""")


@pytest.mark.parametrize("owner", [DiffusionPipeline, ModularPipeline])
@pytest.mark.parametrize("name", sorted(ADDED))
def test_name_that_diffusers_owns_is_left_alone(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = property(lambda pipe: "theirs")
    monkeypatch.setattr(owner, name, theirs)
    with pytest.warns(UserWarning, match=name):
        diffadapt.pipeline.install()
    assert vars(owner)[name] is theirs


def test_public_names_exist() -> None:
    expected = {"AdapterError", "LoraConfig", "adapters", "add_adapter", "convert", "inspect", "load_adapter"}
    expected |= {"Cosine", "Linear", "Piecewise", "block_weights", "parse_prompt"}
    assert expected <= set(diffadapt.__all__)
    assert all(hasattr(diffadapt, name) for name in diffadapt.__all__)
    assert issubclass(diffadapt.AdapterError, ValueError)


# Import directions


@cache
def imports_of(file: Path) -> set[str]:
    """Modules that a file imports anywhere, functions included, by full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources() -> dict[str, Path]:
    """Module name -> file, of the whole package; a package itself has the name of its folder."""
    names = {file: ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def internal_imports() -> dict[str, set[str]]:
    modules = sources()
    return {name: imports_of(file) & set(modules) - {"diffadapt", name} for name, file in modules.items()}


def test_imports_point_one_way() -> None:
    graph = internal_imports()
    # A package imports its own files; `from package import file` inside it means the file.
    for name in graph:
        graph[name] = {other for other in graph[name] if not name.startswith(f"{other}.")}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("diffadapt.types", {"types", "kind", "config", "layer", "errors"}),
        (
            "diffadapt.formats",
            {"formats", "families", "pieces", "types", "patterns", "state", "targets", "layer", "errors"},
        ),
        ("diffadapt.families", {"families", "pieces", "targets", "state", "layer", "errors"}),
        ("diffadapt.kind", {"config", "layer", "errors"}),
        ("diffadapt.config", {"patterns", "layer", "errors"}),
        ("diffadapt.compose", {"adapter", "hooks", "kind", "layer"}),
        ("diffadapt.layer", set[str]()),
        ("diffadapt.schedules", {"errors"}),
        ("diffadapt.scales", {"schedules", "errors"}),
        ("diffadapt.clock", {"schedules", "errors"}),
        ("diffadapt.block_weights", {"scales", "errors"}),
        ("diffadapt.prompt_tags", {"block_weights", "scales", "schedules", "errors"}),
        ("diffadapt.io", {"formats", "state", "errors"}),
        ("diffadapt.mixed", set[str]()),
        ("diffadapt.attach", {"compose", "adapter", "hooks", "locks", "mixed", "slots", "undo", "widen", "errors"}),
        ("diffadapt.locks", {"errors"}),
        ("diffadapt.slots", {"adapter", "kind", "types", "layer", "errors"}),
        ("diffadapt.loaded", {"attach", "adapter", "scales", "schedules", "textual_inversion", "errors"}),
        (
            "diffadapt.hotswap",
            {
                "loaded",
                "load",
                "merge",
                "create",
                "config",
                "io",
                "attach",
                "slots",
                "adapter",
                "targets",
                "hooks",
                "layer",
                "errors",
            },
        ),
        ("diffadapt.widen", {"adapter", "hooks", "layer", "undo", "errors"}),
        ("diffadapt.lowrank", {"compose", "adapter", "attach", "hooks", "layer", "types", "errors"}),
        ("diffadapt.combine", {"lowrank", "types", "errors"}),
        ("diffadapt.vocabulary", {"mixed"}),
        (
            "diffadapt.textual_inversion",
            {"attach", "adapter", "vocabulary", "formats", "io", "layer", "errors"},
        ),
        ("diffadapt.folding", {"compose", "adapter", "kind", "memory"}),
        (
            "diffadapt.merge",
            {
                "compose",
                "attach",
                "adapter",
                "folding",
                "corrections",
                "undo",
                "compact",
                "base_files",
                "io",
                "memory",
                "hooks",
                "layer",
                "errors",
            },
        ),
        ("diffadapt.undo", set[str]()),
        ("diffadapt.compact", {"folding", "corrections", "undo", "errors"}),
        ("diffadapt.base_files", {"io", "attach", "corrections", "undo", "hooks", "errors"}),
        ("diffadapt.corrections", set[str]()),
        ("diffadapt.memory", set[str]()),
        ("diffadapt.pool", {"manager", "loaded", "load", "io", "locks", "errors"}),
    ],
)
def test_who_may_import_whom(package: str, allowed: set[str]) -> None:
    for name, imported in internal_imports().items():
        if name == package or name.startswith(f"{package}."):
            tops = {other.split(".")[1] for other in imported}
            assert tops <= allowed, f"{name} imports {sorted(tops - allowed)}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("peft", set[str]()),
        ("lycoris", set[str]()),
        ("transformers", {"families.published", "demo"}),
        ("accelerate", {"hooks", "demo"}),
        ("diffusers", {"families.published", "hooks", "pipeline", "demo"}),
        ("safetensors", {"io", "formats.lycoris_dump"}),
        ("huggingface_hub", {"io"}),
    ],
)
def test_which_modules_know_a_library(library: str, allowed: set[str]) -> None:
    importing = {
        name.removeprefix("diffadapt.")
        for name, file in sources().items()
        if any(imported.split(".")[0] == library for imported in imports_of(file))
    }
    assert importing <= allowed


def test_only_attach_changes_the_class_of_a_module_and_vocabulary_that_of_a_tokenizer() -> None:
    changing = {
        name
        for name, file in sources().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
    }
    assert changing == {"diffadapt.attach", "diffadapt.vocabulary"}
