"""The lists on the documentation site that are made from the source. `make docs` builds the site itself."""

from pathlib import Path

import diffadapt
from scripts.docs_site import error_list, on_page_markdown, public_names

DOCS = Path(__file__).parents[2] / "docs"


def shown(page: str) -> str:
    return on_page_markdown((DOCS / page).read_text(encoding="utf-8"), None, None, None)


def test_the_reference_has_every_public_name_once() -> None:
    assert public_names() == diffadapt.__all__
    named = [line.split()[1] for line in shown("reference.md").splitlines() if line.startswith(":::")]
    assert sorted(named) == sorted([*(f"diffadapt.{name}" for name in diffadapt.__all__), named[0]])


def test_troubleshooting_lists_the_messages_of_the_library() -> None:
    listed = shown("troubleshooting.md")
    assert "### loading" in listed
    assert error_list() in listed
    for message in ("gated; accept its terms on the hub and pass token=", "multiplies the weight, which a merged"):
        assert message in listed


def test_links_out_of_the_site_become_text() -> None:
    text = "see [`examples`](../examples/hotswap) and [Mixing](mixing.md#strengths)"
    assert on_page_markdown(text, None, None, None) == "see `examples` and [Mixing](mixing.md#strengths)"
