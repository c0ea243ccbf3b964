"""The examples of the documents run on the embedded pipeline and have an effect; links lead somewhere."""

import re
import shlex
import shutil
from collections.abc import Callable
from functools import wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch._dynamo.testing import CompileCounter

from tests.docs import example_files
from tests.docs.example_files import TINY
from tests.docs.markdown import Block, anchors, blocks, links

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
BLOCKS = {document.relative_to(ROOT).as_posix(): blocks(document) for document in DOCUMENTS}
RUNNABLE = [name for name, found in BLOCKS.items() if any(block.language == "python" for block in found)]
STEPS = 3

SUBSTITUTES = {
    '"stable-diffusion-v1-5/stable-diffusion-v1-5"': repr(str(TINY)),
    '"examples/tiny_pipeline"': repr(str(TINY)),
    ".compile()": ".compile(**compiling)",
    "max_train_steps=800": 'max_train_steps=2, train_batch_size=1, report_to="none"',
}
"""What stands in a document -> what runs in its place."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples read."""
    folder = tmp_path_factory.mktemp("files")
    example_files.write(folder)
    return folder


def drawing_quickly(draw: Callable[..., Any], drawn: list[str]) -> Callable[..., Any]:
    """A pipeline's call with few steps and a fixed seed, which tells `drawn` of every picture made with adapters.

    Such a picture must differ from what the base model draws.
    """

    @wraps(draw)
    def call(pipe: Any, *args: Any, **options: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        options["num_inference_steps"] = STEPS
        options.pop("generator", None)

        def run() -> Any:
            return draw(pipe, *args, **options, generator=torch.Generator().manual_seed(0))

        result = run()
        active = pipe.adapters.active
        if active:
            with pipe.adapters.disabled():
                base = run()
            pairs = zip(result.images, base.images, strict=True)
            difference = max(np.abs(np.asarray(one, float) - np.asarray(other, float)).max() for one, other in pairs)
            assert difference > 8, f"{', '.join(active)} changed the picture by {difference:.0f} of 255"
            drawn.extend(active)
        return result

    return call


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block of code, with its lines where they are in the document, or the `diffadapt` commands of a block."""
    text = block.text
    for written, substitute in SUBSTITUTES.items():
        text = text.replace(written, substitute)
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + text, str(block.document), "exec")
        exec(code, namespace)
    for program, *arguments in commands(block):
        if program == "diffadapt":
            (command,) = entry_points(group="console_scripts", name="diffadapt")
            assert command.load()(arguments) == 0, f"{block.document}:{block.line}"


def commands(block: Block) -> list[list[str]]:
    """The commands of a block, as lists of words."""
    if block.language not in ("console", "bash"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_examples_are_found() -> None:
    pages = {"README.md", "docs/formats.md", "docs/hotswap.md", "docs/mixing.md", "docs/training.md"}
    pages |= {f"docs/{name}.md" for name in ("index", "loading", "quantised", "converting", "methods", "migrating")}
    assert pages | {"examples/dreambooth/README.md", "examples/tiny_pipeline/README.md"} <= set(RUNNABLE)
    assert any(words[0] == "diffadapt" for found in BLOCKS.values() for block in found for words in commands(block))


@pytest.mark.slow
@pytest.mark.parametrize("document", RUNNABLE)
def test_examples_run(document: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if document == "docs/quantised.md":
        pytest.importorskip("optimum.quanto")
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # Or what is no file would be looked for on the hub.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    drawn: list[str] = []
    quickly = drawing_quickly(StableDiffusionPipeline.__call__, drawn)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", quickly)
    # Slots for whole batches of types take a minute to compile.
    compiler, is_compiled = CompileCounter(), document == "README.md"
    compiling = {"backend": compiler} if is_compiled else {"disable": True}
    namespace: dict[str, Any] = {"__name__": document, "compiling": compiling}
    for block in BLOCKS[document]:
        run(block, namespace)
    assert drawn or document == "examples/tiny_pipeline/README.md"
    assert compiler.frame_count == is_compiled


def test_commands_name_what_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in (block for found in BLOCKS.values() for block in found):
        for program, *arguments in commands(block):
            where = f"{block.document}:{block.line}"
            if program == "make" and arguments:
                assert arguments[0] in targets, where
            for word in (program, *arguments):
                if word.endswith((".py", ".sh")):
                    assert (ROOT / word).is_file(), f"{where}: {word}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=list(BLOCKS))
def test_links_lead_somewhere(document: Path) -> None:
    dead: list[str] = []
    for line, link in links(document):
        if not re.match(r"https?:", link):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(f"{document}:{line}: {link}")
    assert not dead
