"""`python -m examples.serving`: Ray Serve, the client of OpenAI, a replica that dies, and an end without a trace."""

import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.serving.engine import Engine, Request
from tests.support.serving import TINY, folder_of_adapters, free_port

REASON = "examples/serving needs the extra `serve`"
pytest.importorskip("ray.serve", reason=REASON)
openai: Any = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for processes in /proc"),
]
ROOT = Path(__file__).parents[2]
MIXES: tuple[dict[str, float], ...] = ({"ink": 1.0}, {"pixel": 0.8, "critter": 0.5}, {})


def descendants(ancestor: int) -> dict[int, str]:
    """The processes that a process and its children have started, and their titles."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [ancestor]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return {process: titles[process] for process in found[1:] if process in titles}


def is_running(process: int) -> bool:
    """Whether a process exists and is not one that has ended and that nobody has asked about."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def service(adapters: Path, log: Path) -> Generator[tuple[Any, subprocess.Popen[bytes]], None, None]:
    """Start the service; yield a client and the process, which ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "examples.serving", "--port", str(port), "--adapters", str(adapters)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 300
        while "ready: " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def draw(client: Any, seed: int, steps: int = 2) -> np.ndarray[Any, Any]:
    """Draw a picture with the mix of a seed."""
    options = {"adapters": MIXES[seed % len(MIXES)], "seed": seed, "num_inference_steps": steps}
    answer = client.images.generate(prompt="a red circle", model="any", size="64x64", extra_body=options)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))), int)


def test_the_service_draws_survives_and_ends(tmp_path: Path) -> None:
    adapters = folder_of_adapters(tmp_path)
    with service(adapters, tmp_path / "log") as (client, process):
        with ThreadPoolExecutor(6) as threads:
            drawn = list(threads.map(lambda seed: draw(client, seed), range(6)))
        with pytest.raises(openai.NotFoundError, match="similar names: ink") as caught:
            client.images.generate(prompt="x", extra_body={"adapters": {"inkk": 1}})
        assert caught.value.code == "adapter_not_found"

        # A replica dies while it draws, and the request is drawn by the next one.
        (painter,) = (number for number, title in descendants(process.pid).items() if ":Painter" in title)
        threading.Timer(1.0, os.kill, (painter, signal.SIGKILL)).start()
        long = draw(client, 0, steps=100)
        assert painter not in descendants(process.pid)
        started = descendants(process.pid)
    end = time.monotonic() + 30
    while left := {number: title for number, title in started.items() if is_running(number)}:
        assert time.monotonic() < end, left
        time.sleep(0.2)

    engine = Engine(TINY, adapters)
    requests = [Request("a red circle", MIXES[seed % 3], seed, 2) for seed in range(6)]
    expected = engine.draw([*requests, Request("a red circle", MIXES[0], 0, 100)])
    for found, picture in zip([*drawn, long], expected, strict=True):
        assert isinstance(picture, Image.Image)
        assert np.abs(found - np.asarray(picture, int)).max() <= 1
    engine.close()
