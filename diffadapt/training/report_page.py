"""The report page of a run: one HTML file with everything in it, which needs no network and no server."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffadapt.training.history import BANDS, History
from diffadapt.training.saving import data_url

REPORT_FILE = "report.html"
_WIDTH, _HEIGHT, _MARGIN = 640, 220, 46
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706")
_SMOOTHING = 0.95


def write_report(
    folder: Path,
    history: History,
    *,
    title: str,
    data: str,
    options: Mapping[str, Any],
    files: Sequence[Path],
    contact_sheet: Image.Image | None = None,
) -> Path:
    """Write `report.html` to a folder and return its path.

    Args:
        folder: the output folder.
        history: the numbers of the run, and the names of the preview sheets in the folder.
        title: the title of the page.
        data: the description of the data set.
        options: the options that differ from their defaults.
        files: files to link to.
        contact_sheet: the pictures as they are trained.
    """
    sheets = [
        (entry["step"], data_url(Image.open(folder / entry["file"])))
        for entry in history.previews
        if (folder / entry["file"]).is_file()
    ]
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in options.items())
    links = "".join(
        f'<li><a href="{html.escape(_relative(path, folder), quote=True)}">{_text(path.name)}</a></li>'
        for path in files
    )
    picture = "" if contact_sheet is None else f'<img alt="the pictures" src="{data_url(contact_sheet)}">'
    parts = [
        f"<h1>{_text(title)}</h1>",
        _slider(sheets),
        "<h2>Loss</h2>",
        _chart("loss", _series(history, ["loss", "prior"])),
        _chart("loss by noise level", _series(history, [f"band_{n}" for n in range(BANDS)])),
        _chart("held-out loss at fixed noise", _held_out(history)),
        _chart("learning rate", _series(history, ["lr"], smooth=False)),
        _chart("gradient norm", _series(history, ["gradient_norm"])),
        f"<h2>Data</h2><pre>{_text(data)}</pre>{picture}",
        f"<h2>Options</h2><table>{rows}</table>",
        f"<h2>Files</h2><ul>{links}</ul>",
    ]
    path = folder / REPORT_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_PAGE.format(title=_text(title), body="\n".join(filter(None, parts))), encoding="utf-8")
    temporary.replace(path)
    return path


Series = dict[str, list[tuple[float, float]]]


def _series(history: History, names: Sequence[str], *, smooth: bool = True) -> Series:
    found: Series = {}
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history.steps if name in entry]
        if points:
            found[_LABELS.get(name, name)] = _smoothed(points) if smooth else points
    return found


_LABELS = {
    "band_0": "cleanest quarter",
    "band_1": "second",
    "band_2": "third",
    "band_3": "noisiest quarter",
    "prior": "preservation",
}


def _held_out(history: History) -> Series:
    found: Series = {}
    for entry in history.held_out:
        for name, value in entry.items():
            if name != "step":
                found.setdefault(name, []).append((entry["step"], value))
    return found


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points with an exponential mean of their values, without the bias towards 0 at the start."""
    decay = min(_SMOOTHING, 1 - 1 / max(1, len(points) / 10))
    total = weight = 0.0
    found: list[tuple[float, float]] = []
    for step, value in points:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        found.append((step, total / weight))
    return found


def _chart(title: str, series: Series) -> str:
    """Return a chart as SVG; nothing without points."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    right, high = (right if right > left else left + 1), (high if high > low else low + 1e-12 + abs(low))

    def at(x: float, y: float) -> str:
        across = _MARGIN + (x - left) / (right - left) * (_WIDTH - 2 * _MARGIN)
        down = _HEIGHT - 26 - (y - low) / (high - low) * (_HEIGHT - 52)
        return f"{across:.1f},{down:.1f}"

    lines: list[str] = []
    legend: list[str] = []
    for colour, (name, line) in zip(_COLOURS, series.items(), strict=False):
        shown = line[:: max(1, len(line) // 1000)]
        path = " ".join(at(*point) for point in shown)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
        if len(line) == 1:
            x, y = at(*line[0]).split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        legend.append(f'<tspan fill="{colour}">{_text(name)}</tspan>')
    labels = (
        f'<text x="4" y="{_HEIGHT - 26}">{low:.3g}</text><text x="4" y="30">{high:.3g}</text>'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 6}">step {left:g}</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 6}" text-anchor="end">{right:g}</text>'
        f'<text x="{_MARGIN}" y="14">{_text(title)}: {" ".join(legend)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(title)}">{"".join(lines)}{labels}</svg>'
    )


def _slider(sheets: Sequence[tuple[int, str]]) -> str:
    """Return the preview sheets as a slider over the steps."""
    if not sheets:
        return ""
    content = json.dumps([{"step": step, "url": url} for step, url in sheets])
    last = len(sheets) - 1
    return f"""<h2>Pictures by step</h2>
<p><input type="range" id="step" min="0" max="{last}" value="{last}" aria-label="step">
step <output id="at">{sheets[-1][0]}</output></p>
<img id="sheet" alt="pictures at this step" src="{sheets[-1][1]}">
<script>
const sheets = {content};
document.getElementById("step").addEventListener("input", event => {{
  const chosen = sheets[event.target.value];
  document.getElementById("sheet").src = chosen.url;
  document.getElementById("at").textContent = chosen.step;
}});
</script>"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.resolve().as_uri()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 860px; margin: 2em auto; padding: 0 1em; color: #1f2937; }}
img, svg {{ max-width: 100%; height: auto; display: block; margin: 0.5em 0; }}
svg {{ background: #f8fafc; font-size: 11px; }}
pre {{ background: #f8fafc; padding: 0.7em; white-space: pre-wrap; }}
td {{ padding: 0.1em 1em 0.1em 0; vertical-align: top; overflow-wrap: anywhere; }}
input[type=range] {{ width: 60%; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
