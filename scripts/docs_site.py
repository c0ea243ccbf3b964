"""What mkdocs does to the pages of docs/ when it builds the site: links out of docs/, lists made from the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "diffadapt"
ERRORS, SETTINGS, OTHERS = "<!-- all errors -->", "<!-- all settings -->", "<!-- all other names -->"
_OUTSIDE = re.compile(r"\[([^\[\]]+)\]\((?:\.\./)+[^()\s]+\)")
_RAISED = {"AdapterError", "LoadError", "Unused", "Fault"}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the text of a page for the site. This is a hook of mkdocs."""
    # The repository's files are not on the site, so that links to them become plain text.
    text = _OUTSIDE.sub(r"\1", markdown)
    if ERRORS in text:
        text = text.replace(ERRORS, error_list())
    if OTHERS in text:
        names = [name for name in public_names() if f"::: diffadapt.{name}\n" not in text]
        settings = [name for name in names if name.endswith("Config")]
        text = text.replace(SETTINGS, _references(settings, members="false"))
        text = text.replace(OTHERS, _references([name for name in names if name not in settings]))
    return text


def public_names() -> list[str]:
    """Return `diffadapt.__all__`, read from the source."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise LookupError("diffadapt/__init__.py has no __all__")


def _references(names: list[str], **options: str) -> str:
    lines = [f"      {name}: {value}" for name, value in options.items()]
    below = "".join(f"\n{line}" for line in ["    options:", *lines]) if lines else ""
    return "\n\n".join(f"::: diffadapt.{name}{below}" for name in names)


def error_list() -> str:
    """Return all messages of the library as a list for each folder, read from its source."""
    lines: list[str] = []
    for folder in sorted(path for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()):
        messages = sorted({message for file in folder.rglob("*.py") for message in messages_in(file)}, key=str.lower)
        if messages:
            lines += ["", f"### {folder.name}", "", *(f"* {_escaped(message)}" for message in messages)]
    return "\n".join(lines)


def messages_in(file: Path) -> Iterator[str]:
    """Yield the messages of the errors that a module raises or reports; `…` stands for what depends on the case."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _RAISED:
            # Of `Fault(key, reason)`, the reason is the message.
            arguments = node.args[1:] if node.func.id == "Fault" else node.args[:1]
            for argument in arguments:
                text = _template(argument).strip()
                if len(text.replace("…", "").split()) > 2:
                    yield text


def _template(node: ast.AST) -> str:
    """Return the text of a string literal with `…` for everything that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(map(_template, node.values)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "…"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>{}#|])", r"\\\1", " ".join(text.split()))
