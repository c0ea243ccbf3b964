"""The effects of `import diffadapt`, and which modules may import which."""

import ast
import inspect
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import diffadapt
import diffadapt.pipelines.installation
from tests.support.versions import diffusers

PACKAGE = Path(diffadapt.__file__).parent
OWNERS = ("DiffusionPipeline", "ModularPipeline")
ADDED = {"load_adapter", "adapters"}


def run(script: str) -> str:
    """Run a script in a new interpreter, and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_import_adds_two_names_to_pipelines_and_changes_nothing_else() -> None:
    run(f"""
import diffusers, sys, torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import PreTrainedModel
owners = [getattr(diffusers, name) for name in {OWNERS!r} if hasattr(diffusers, name)]
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
def test_pipelines_imported_later_have_the_names_and_need_no_peft() -> None:
    """Without peft, an adapter works on a pipeline that is imported after this library, also with a call scale."""
    run(f"""
import importlib.machinery, sys

class WithoutPeft(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "peft" else super().find_spec(name, path, target)

sys.meta_path = [WithoutPeft if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import diffadapt
assert not any(name.startswith("diffusers.pipelines.") for name in sys.modules)
import diffusers.utils
assert not diffusers.utils.USE_PEFT_BACKEND
for kind in [getattr(diffusers, name) for name in {OWNERS!r} if hasattr(diffusers, name)]:
    assert callable(kind.load_adapter) and isinstance(kind.adapters, property)

import torch
from tests.support import loras, models, spellings
torch.set_num_threads(1)
pipe = models.sd15()
base = models.draw(pipe)
pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
halved = models.draw(pipe, cross_attention_kwargs={{"scale": 0.5}})
pipe.adapters.activate({{"a": 0.5}})
expected = models.draw(pipe)
assert (halved - expected).abs().max() < 1e-5 < (halved - base).abs().max()
assert not any(name == "peft" or name.startswith("peft.") for name in sys.modules)
""")


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("name", sorted(ADDED))
def test_a_name_that_diffusers_has_itself_is_left_alone(owner: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(diffusers, owner)
    theirs = property(lambda pipe: "theirs")
    monkeypatch.setattr(kind, name, theirs)
    with pytest.warns(UserWarning, match=name):
        diffadapt.pipelines.installation.install()
    assert vars(kind)[name] is theirs


def test_public_names_exist() -> None:
    expected = {"AdapterError", "LoraConfig", "adapters", "add_adapter", "convert", "inspect", "load_adapter"}
    expected |= {"Cosine", "Linear", "Piecewise", "block_weights", "parse_prompt"}
    assert expected <= set(diffadapt.__all__)
    assert all(hasattr(diffadapt, name) for name in diffadapt.__all__)
    assert issubclass(diffadapt.AdapterError, ValueError)


# Import directions


@cache
def imports_of(file: Path) -> set[str]:
    """Return the full names of the modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources() -> dict[str, Path]:
    """Return module name -> file for the whole package; a package has the name of its folder."""
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


def wing(module: str) -> str:
    """Return the row of ARCHITECTURE's table that a module belongs to: its folder, or itself if it is in none."""
    parts = module.split(".")[1:]
    return f"{parts[0]}/" if parts and (PACKAGE / parts[0]).is_dir() else ".".join(parts)


@cache
def table() -> dict[str, set[str]]:
    """Return ARCHITECTURE's table of the wings: wing -> the wings that it may import."""
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text().split("## Where a line belongs", 1)[1]
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\|([^|]*)\|$", text.split("\n## ", 1)[0], re.MULTILINE)
    return {name: set(re.findall(r"`([^`]+)`", allowed)) for name, allowed in rows}


def test_every_module_has_a_row_in_architecture_and_every_row_has_modules() -> None:
    modules = {wing(name) for name in sources() if name != "diffadapt"}
    assert modules == set(table())


@pytest.mark.parametrize("name", sorted(table()))
def test_a_wing_imports_exactly_the_wings_in_its_row_in_architecture(name: str) -> None:
    used: dict[str, set[str]] = {}
    for module, imported in internal_imports().items():
        if module != "diffadapt" and wing(module) == name:
            for other in imported:
                used.setdefault(wing(other), set()).add(f"{module} imports {other}")
    used.pop(name, None)
    allowed = table()[name]
    assert set(used) <= allowed, {other: found for other, found in used.items() if other not in allowed}
    assert allowed <= set(used), f"{name} imports nothing of {sorted(allowed - set(used))}"


def test_wings_import_each_other_in_one_direction() -> None:
    list(TopologicalSorter(table()).static_order())


def test_modules_are_short_and_do_not_have_the_names_of_public_functions() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in sources().items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    functions = {name for name in diffadapt.__all__ if inspect.isfunction(getattr(diffadapt, name))}
    assert {name for name in sources() if name.rpartition(".")[2] in functions} == set()


def test_tests_have_the_folders_of_the_package_and_do_not_import_each_other() -> None:
    tests = PACKAGE.parent / "tests"
    wings = {name.removesuffix("/") for name in table() if name.endswith("/")}
    folders = {folder.name for folder in tests.iterdir() if (folder / "__init__.py").exists()}
    assert wings <= folders
    assert folders - wings <= {"support", "examples", "docs", "scripts"}
    for file in tests.rglob("*.py"):
        others = {name for name in imports_of(file) if name.startswith("tests.") and ".test_" in name}
        assert not others, f"{file.relative_to(tests)} imports {sorted(others)}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("peft", set[str]()),
        ("lycoris", set[str]()),
        ("transformers", {"families.published"}),
        ("accelerate", set[str]()),
        (
            "diffusers",
            {"families.published", "runtime.foreign_hooks", "weights.gguf", "weights.nvfp4", "demo", "cli.draw_grid"},
        ),
        ("safetensors", {"files.safetensors_file", "files.write", "formats.lycoris_dump"}),
        ("huggingface_hub", {"files.hub"}),
    ],
)
def test_only_these_modules_import_a_library(library: str, allowed: set[str]) -> None:
    importing = {
        name.removeprefix("diffadapt.")
        for name, file in sources().items()
        # The trainer calls diffusers and accelerate as a program does, but needs neither peft nor lycoris.
        if any(imported.split(".")[0] == library for imported in imports_of(file))
        and (library in ("peft", "lycoris") or wing(name) != "training/")
    }
    assert importing <= allowed


def test_only_class_mixing_changes_the_class_of_an_object() -> None:
    changing = {
        name
        for name, file in sources().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
    }
    assert changing == {"diffadapt.runtime.class_mixing"}
