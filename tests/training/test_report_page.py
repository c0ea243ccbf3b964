"""`report.html`: what a run writes, and what a browser makes of it."""

import html.parser
import json
from pathlib import Path

import pytest

from diffadapt.training.history import History
from diffadapt.training.report_page import write_report
from tests.support import models
from tests.support.browser import CHROMIUM, opened
from tests.support.training import WEIGHTS, train, write_pictures

pytestmark = pytest.mark.slow
CHARTS = {"loss", "loss by noise level", "held-out loss at fixed noise", "learning rate", "gradient norm"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    models.sd15().save_pretrained(folder / "base")
    further = {"validation_prompt": "a <b>sks</b>", "num_validation_images": 2, "learning_rate": 0.1}
    train(
        folder / "base",
        write_pictures(folder / "pictures"),
        folder / "out",
        held_out_pictures=1,
        validation_steps=2,
        max_train_steps=3,
        **further,
    )
    return folder / "out" / "report.html"


def test_the_page_is_whole_and_names_every_step_with_pictures(report: Path) -> None:
    class Page(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.sources: list[str] = []
            self.charts: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found = dict(attrs)
            if tag not in ("meta", "input", "img", "br", "circle", "polyline", "path"):
                self.open.append(tag)
            self.sources += [value for name, value in attrs if name == "src" and value]
            if tag == "svg":
                self.charts.append(str(found["aria-label"]))

        def handle_endtag(self, tag: str) -> None:
            if tag in self.open:
                assert self.open.pop() == tag

    text = report.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(source.startswith("data:") for source in page.sources)
    assert set(page.charts) == CHARTS
    sheets = json.loads(text.split("const sheets = ")[1].split(";\n")[0])
    assert [entry["step"] for entry in sheets] == [0, 2, 3]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_curves_pictures_and_links_without_any_request(report: Path, tmp_path: Path) -> None:
    pytest.importorskip("websockets", reason="Chromium is driven through a websocket; install the extra `serve`")
    with opened(report.as_uri(), tmp_path / "profile") as page:
        page.wait_for("document.readyState === 'complete' && document.getElementById('files')")
        points = "[...document.querySelectorAll('svg[aria-label=\"{}\"] polyline')].map(line => line.points.length)"
        assert page.run(points.format("loss")) == [3]
        assert page.run(points.format("learning rate")) == [3]
        for chart in CHARTS:
            assert sum(page.run(points.format(chart))) >= 3, chart
        inside = """[...document.querySelectorAll('polyline')].every(line => {
            const box = line.ownerSVGElement.viewBox.baseVal;
            return [...line.points].every(p => p.x >= 0 && p.x <= box.width && p.y >= 0 && p.y <= box.height);
        })"""
        assert page.run(inside)

        seen: dict[str, str] = {}
        for position in (0, 1, 2):
            page.run(
                f"Object.assign(document.getElementById('step'), {{value: {position}}})"
                ".dispatchEvent(new Event('input'))"
            )
            page.run("document.getElementById('sheet').decode()")
            assert page.run("document.getElementById('sheet').naturalWidth") > 30
            seen[page.run("document.getElementById('at').textContent")] = page.run(
                "document.getElementById('sheet').src"
            )
        assert list(seen) == ["0", "2", "3"]
        assert len(set(seen.values())) == 3

        assert "2 pictures" in page.run("document.getElementById('data').innerText")
        assert page.run("document.querySelector('#data img').naturalWidth") > 30
        options = page.run("document.getElementById('options').innerText")
        assert "validation_prompt" in options
        assert "a <b>sks</b>" in options
        links = page.run("[...document.querySelectorAll('#files a')].map(link => link.href)")
        assert (report.parent / WEIGHTS).as_uri() in links
        assert all(Path(link.removeprefix("file://").replace("%20", " ")).exists() for link in links)

        page.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        requests = "performance.getEntriesByType('resource').map(entry => entry.name)"
        assert [name for name in page.run(requests) if not name.startswith("data:")] == []
        # The page's own policy makes the browser refuse any request, and a refused one is a problem.
        assert page.problems == []
        refused = "fetch('http://127.0.0.1:9/').then(() => false, () => true)"
        assert page.run(refused)


def test_a_run_without_steps_or_pictures_has_a_page(tmp_path: Path) -> None:
    flat = History(steps=[{"step": 1.0, "loss": 0.5}, {"step": 2.0, "loss": 0.5}])
    for history, expected in ((History(), "no steps"), (flat, "2 steps; loss 0.5")):
        text = write_report(tmp_path, history, title="a & b", data="", options={}, files=[]).read_text()
        assert expected in text
        assert "<h1>a &amp; b</h1>" in text
        assert "nan" not in text
