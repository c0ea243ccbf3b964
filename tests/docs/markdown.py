"""What is in a markdown file: its fenced blocks, links and headings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: number of its first line in the document, from 1.
    """

    document: Path
    line: int
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    """All fenced blocks, in their order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, found.start(2)) + 1, found[1], found[2]) for found in _FENCED.finditer(text)
    ]


def links(document: Path) -> Iterator[tuple[int, str]]:
    """Line and target of every link and picture."""
    prose = _INLINE_CODE.sub(_blank, _prose(document))
    for found in _LINK.finditer(prose):
        yield prose.count("\n", 0, found.start()) + 1, found[1]


def anchors(document: Path) -> set[str]:
    """What links may have behind `#`, as GitHub makes it of the headings."""
    found: list[str] = []
    for heading in _HEADING.findall(_prose(document)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def _prose(document: Path) -> str:
    """The text without fenced blocks, with the same lines."""
    return _FENCED.sub(_blank, document.read_text(encoding="utf-8"))


def _blank(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")
