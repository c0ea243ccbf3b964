"""The report page of a run: one HTML file with everything in it, which needs no network and no server."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffadapt.training.history import BANDS, History
from diffadapt.training.saving import data_url

REPORT_FILE = "report.html"
_WIDTH, _HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 28
_LINES = 4
"""The largest number of horizontal grid lines of a chart, the one at the bottom not counted."""
_COLOURS = 4
"""Number of line colours of the style sheet."""
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
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in options.items())
    links = "".join(
        f'<li><a href="{html.escape(_relative(path, folder), quote=True)}">{_text(path.name)}</a></li>'
        for path in files
    )
    picture = "" if contact_sheet is None else f'<img alt="the pictures as trained" src="{data_url(contact_sheet)}">'
    charts = [
        _chart("loss", _series(history, ["loss", "prior"])),
        _chart("loss by noise level", _series(history, [f"band_{n}" for n in range(BANDS)])),
        _chart("held-out loss at fixed noise", _held_out(history)),
        _chart("learning rate", _series(history, ["lr"], smooth=False)),
        _chart("gradient norm", _series(history, ["gradient_norm"])),
    ]
    parts = [
        f"<header><h1>{_text(title)}</h1><p>{_text(_summary(history))}</p></header>",
        _slider(sheets),
        f'<section id="curves"><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>',
        f'<section id="data"><h2>Data set</h2><pre>{_text(data)}</pre>{picture}</section>',
        f'<section id="options"><h2>Options</h2><div class="wide"><table>{rows}</table></div></section>',
        f'<section id="files"><h2>Files</h2><ul>{links}</ul></section>',
    ]
    path = folder / REPORT_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_PAGE.format(title=_text(title), body="\n".join(filter(None, parts))), encoding="utf-8")
    temporary.replace(path)
    return path


def _summary(history: History) -> str:
    """Return how long the run was, and where the loss ended."""
    loss = _series(history, ["loss"]).get("loss", [])
    if not loss:
        return "no steps"
    return f"{loss[-1][0]:g} steps; loss {loss[-1][1]:.3g} at the end (smoothed)"


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
    "lr": "learning rate",
    "gradient_norm": "gradient norm",
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
    """Return a chart as SVG with its title and legend; nothing without points."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    right = right if right > left else left + 1
    grid = _grid(min(y for _, y in points), max(y for _, y in points))
    low, high = grid[0], grid[-1]

    def across(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [
        f'<path class="grid" d="M{_LEFT} {down(y):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        for y in grid
    ]
    drawn.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">step {left:g}</text>')
    drawn.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{right:g}</text>')
    legend: list[str] = []
    for number, (name, line) in enumerate(series.items()):
        shown = line[:: max(1, len(line) // 1000)]
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in shown)
        colour = f"line{number % _COLOURS}"
        drawn.append(f'<polyline class="{colour}" points="{path}"/>')
        if len(line) == 1:
            drawn.append(f'<circle class="{colour}" cx="{across(line[0][0]):.1f}" cy="{down(line[0][1]):.1f}" r="3"/>')
        legend.append(f'<span class="{colour}">{_text(name)}</span>')
    names = "" if list(series) == [title] else f'<span class="legend">{" ".join(legend)}</span>'
    return (
        f"<figure><figcaption><b>{_text(title)}</b>{names}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(title)}">{"".join(drawn)}</svg></figure>'
    )


def _grid(low: float, high: float) -> list[float]:
    """Return round numbers at equal distances, from at most `low` to at least `high`."""
    span = max(high - low, abs(low) * 1e-3, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / _LINES))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * _LINES >= span * (1 - 1e-9))
    first = math.floor(low / step)
    return [step * number for number in range(first, max(math.ceil(high / step), first + 1) + 1)]


def _slider(sheets: Sequence[tuple[int, str]]) -> str:
    """Return the preview sheets as a slider over the steps."""
    if not sheets:
        return ""
    content = json.dumps([{"step": step, "url": url} for step, url in sheets])
    last = len(sheets) - 1
    return f"""<section id="pictures"><h2>Pictures by step</h2>
<p class="slider"><input type="range" id="step" min="0" max="{last}" value="{last}" aria-label="step">
<span>step <output id="at">{sheets[-1][0]}</output></span></p>
<img id="sheet" alt="pictures at this step" src="{sheets[-1][1]}">
<script>
const sheets = {content};
document.getElementById("step").addEventListener("input", event => {{
  const chosen = sheets[event.target.value];
  document.getElementById("sheet").src = chosen.url;
  document.getElementById("at").textContent = chosen.step;
}});
</script></section>"""


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
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #f1f5f9; --card: #ffffff; --text: #0f172a; --soft: #64748b; --rule: #e2e8f0;
  --line0: #2563eb; --line1: #e11d48; --line2: #059669; --line3: #d97706; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #0b1120; --card: #151e31; --text: #e2e8f0; --soft: #94a3b8;
  --rule: #273349; --line0: #60a5fa; --line1: #fb7185; --line2: #34d399; --line3: #fbbf24; }} }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 3rem;
  color: var(--text); background: var(--back); }}
h1 {{ font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 0 0 0.7rem; }}
header p {{ color: var(--soft); margin: 0.2rem 0 1.2rem; }}
section {{ background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 1.1rem 1.2rem;
  margin-bottom: 1rem; }}
img {{ max-width: 100%; height: auto; display: block; border-radius: 6px; }}
#sheet {{ width: 100%; max-width: 720px; }}
.slider {{ display: flex; gap: 1rem; align-items: center; margin: 0 0 0.8rem; }}
.slider input {{ flex: 1; min-width: 0; accent-color: var(--line0); }}
.slider span {{ min-width: 6em; font-variant-numeric: tabular-nums; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.2rem; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ font-size: 0.9rem; display: flex; flex-wrap: wrap; gap: 0 1rem; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0 0.9rem; font-size: 0.85rem; }}
svg {{ width: 100%; height: auto; display: block; font-size: 11px; fill: var(--soft); }}
.grid {{ stroke: var(--rule); }}
polyline {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }}
.line0 {{ stroke: var(--line0); color: var(--line0); }} .line1 {{ stroke: var(--line1); color: var(--line1); }}
.line2 {{ stroke: var(--line2); color: var(--line2); }} .line3 {{ stroke: var(--line3); color: var(--line3); }}
circle {{ fill: currentColor; }}
pre {{ font-size: 0.85rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 0.8rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem; }}
tr + tr {{ border-top: 1px solid var(--rule); }}
th {{ text-align: left; font-weight: 500; color: var(--soft); }}
th, td {{ padding: 0.3rem 1rem 0.3rem 0; vertical-align: top; overflow-wrap: anywhere; }}
ul {{ margin: 0; padding-left: 1.2rem; }}
a {{ color: var(--line0); overflow-wrap: anywhere; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
