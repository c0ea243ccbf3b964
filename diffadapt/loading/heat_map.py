"""A picture of where an adapter acts: a table of blocks and projections, as HTML."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass

_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?:\.(?:attentions|resnets|downsamplers|upsamplers)\.\d+)?(?=\.)")


@dataclass(frozen=True)
class HeatMap:
    """The sizes of an adapter's changes by block and projection.

    Attributes:
        rows: names of the blocks, in the order of the model.
        columns: names of the projections.
        values: (row, column) -> mean size of the layers there; pairs without a layer are missing.
        caption: what the sizes are.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Mapping[tuple[str, str], float]
    caption: str

    @classmethod
    def of(cls, sizes: Mapping[str, float], caption: str) -> "HeatMap":
        """Return the map of sizes by "component.path"."""
        found: dict[tuple[str, str], list[float]] = {}
        for where, size in sizes.items():
            found.setdefault(block_and_projection(where), []).append(size)
        rows = tuple(sorted(dict.fromkeys(row for row, _ in found), key=_natural))
        columns = tuple(sorted(dict.fromkeys(column for _, column in found)))
        return cls(rows, columns, {place: sum(each) / len(each) for place, each in found.items()}, caption)

    def html(self) -> str:
        """Return the map as an HTML table, the darker the larger."""
        largest = max(self.values.values(), default=0.0) or 1.0
        names = "".join(f"<th style='font-weight:normal'>{html.escape(column)}</th>" for column in self.columns)
        lines = [f"<tr><th style='text-align:left;font-weight:normal'>{html.escape(self.caption)}</th>{names}</tr>"]
        for row in self.rows:
            cells = "".join(self._cell(row, column, largest) for column in self.columns)
            lines.append(f"<tr><td style='text-align:left'>{html.escape(row)}</td>{cells}</tr>")
        return f"<table style='font-size:smaller'>{''.join(lines)}</table>"

    def _cell(self, row: str, column: str, largest: float) -> str:
        value = self.values.get((row, column))
        if value is None:
            return "<td></td>"
        # Black on white and white on dark blue both stay readable.
        share = value / largest
        text = "white" if share > 0.6 else "black"
        return (
            f"<td title='{html.escape(f'{row}.{column}')}' style='text-align:right;color:{text};"
            f"background:hsl(215,70%,{100 - 65 * share:.0f}%)'>{value:.2g}</td>"
        )


def block_and_projection(where: str) -> tuple[str, str]:
    """Return the block that a layer is in, and its name there without numbers.

    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0" is `attn1.to_out` in
    "unet.down_blocks.1.attentions.0".
    """
    block = _BLOCK.match(where)
    if block is None:
        component, _, name = where.partition(".")
        return component, name or where
    words = [word for word in where[block.end() + 1 :].split(".") if not word.isdigit()]
    return block[0], ".".join(word for word in words if word != "transformer_blocks") or where


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]
