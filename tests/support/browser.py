"""A headless Chromium, driven by its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


class Page:
    """The page of a browser.

    Attributes:
        problems: what scripts threw and what the console logged as an error.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._number = 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; return its result."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=120))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
                self.problems.append(json.dumps(message["params"]))

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; a promise is awaited."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 120) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not true in {seconds} seconds: {condition}; {self.problems}"
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        """Write what the page looks like to a PNG file."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def opened(url: str, profile: Path, size: tuple[int, int] = (1200, 800)) -> Generator[Page, None, None]:
    """Open a page in a new browser.

    Args:
        profile: an empty folder for what the browser writes.
        size: width and height of the window.
    """
    from websockets.sync.client import connect  # Comes with the extra `serve`.

    assert CHROMIUM is not None
    window = [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "about:blank"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([CHROMIUM, *_FLAGS, *window], **silent) as browser:
        try:
            port = _port(profile / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(page for page in json.load(answer) if page["type"] == "page")
            with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
                page = Page(connection)
                page.send("Page.navigate", url=url)
                yield page
        finally:
            browser.terminate()


def _port(file: Path) -> str:
    """Return the port that the browser listens at; it writes it to a file when it is ready."""
    for _ in range(600):
        if file.exists() and file.read_text().count("\n"):
            return file.read_text().split("\n")[0]
        time.sleep(0.1)
    raise AssertionError("Chromium did not start")
