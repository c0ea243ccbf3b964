"""`python -m examples.serving`: Ray Serve, the client of OpenAI, two replicas, one of which dies, and a clean end."""

import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.serving.engine import Engine, Request
from scripts.serving_process import Service, descendants
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
    command = [sys.executable, "-m", "examples.serving", f"--port={port}", f"--adapters={adapters}", "--replicas=2"]
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


def draw(client: Any, seed: int, steps: int = 2) -> tuple[np.ndarray[Any, Any], Any]:
    """Draw a picture with the mix of a seed; return it, and what the answer says of it."""
    options = {"adapters": MIXES[seed % len(MIXES)], "seed": seed, "num_inference_steps": steps}
    answer = client.images.generate(prompt="a red circle", model="any", size="64x64", extra_body=options).data[0]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.b64_json))), int), answer


def open_ports(processes: Iterable[int]) -> set[str]:
    """The addresses at which TCP ports of the processes listen, in hexadecimal."""
    sockets: set[str] = set()
    for process in processes:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                sockets.add(str(entry.readlink()))
    tables = "".join(Path(f"/proc/net/{table}").read_text() for table in ("tcp", "tcp6"))
    rows = [fields for line in tables.splitlines() if len(fields := line.split()) > 9 and fields[3] == "0A"]
    return {fields[1].partition(":")[0] for fields in rows if f"socket:[{fields[9]}]" in sockets}


def test_two_replicas_draw_survive_and_end(tmp_path: Path) -> None:
    adapters = folder_of_adapters(tmp_path)
    with service(adapters, tmp_path / "log") as (client, process):
        running = Service(str(client.base_url).removesuffix("/v1/"), process.pid)
        with ThreadPoolExecutor(8) as threads:
            drawn = list(threads.map(lambda seed: draw(client, seed), range(24)))
        assert len({answer.replica for _, answer in drawn}) == 2
        with pytest.raises(openai.NotFoundError, match="similar names: ink") as caught:
            client.images.generate(prompt="x", extra_body={"adapters": {"inkk": 1}})
        assert caught.value.code == "adapter_not_found"
        # 127.0.0.1, also as an IPv6 address.
        assert {port[-8:] for port in open_ports([process.pid, *descendants(process.pid)])} == {"0100007F"}

        # A request goes to a replica that has its adapter, and stays there.
        time.sleep(1)
        routed = [draw(client, seed) for seed in (0, 1, 0, 1, 0, 1)]
        assert all(answer.in_memory for _, answer in routed)

        # A replica dies while it draws. The other one draws the request, and then those for the adapter.
        before = running.replicas()
        threading.Timer(1.0, lambda: running.kill(busiest(running, before))).start()
        long = draw(client, 0, steps=100)
        assert len(before.keys() - running.replicas().keys()) == 1
        after = [draw(client, seed) for seed in (0, 1, 2)]
        started = descendants(process.pid)
    end = time.monotonic() + 30
    while left := {number: title for number, title in started.items() if is_running(number)}:
        assert time.monotonic() < end, left
        time.sleep(0.2)

    engine = Engine(TINY, adapters)
    seeds = [*range(24), 0, 1, 0, 1, 0, 1, 0, 0, 1, 2]
    requests = [Request("a red circle", MIXES[seed % 3], seed, 2) for seed in seeds]
    requests[30] = replace(requests[30], steps=100)
    for (found, _), picture in zip([*drawn, *routed, long, *after], engine.draw(requests), strict=True):
        assert isinstance(picture, Image.Image)
        assert np.abs(found - np.asarray(picture, int)).max() <= 1
    engine.close()


def busiest(running: Service, before: Mapping[int, float]) -> int:
    """The replica that has used the most CPU time since `before`."""
    return max(before, key=lambda process: running.replicas().get(process, 0.0) - before[process])
