"""The service of examples/serving as a process of its own, and requests to it over HTTP."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from examples.serving.engine import Request

MOST_TRIES = 5


@dataclass(frozen=True)
class Answer:
    """What a client gets.

    Attributes:
        status: HTTP status; 0 if there was no answer.
        message: what went wrong.
        picture: the picture, with status 200.
        replica: id of the replica that drew it.
        in_memory: whether that replica had the adapters in memory.
        tries: how often the request was sent: again if the service asks for it (503).
        seconds: from the first sending to the answer.
    """

    status: int
    message: str = ""
    picture: Image.Image | None = None
    replica: str = ""
    in_memory: bool = False
    tries: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Service:
    """A service that runs on this machine.

    Attributes:
        address: its URL.
        process: id of its main process.
    """

    address: str
    process: int

    def ask(self, request: Request) -> Answer:
        """Return the answer to a request for one picture."""
        fields = {
            "prompt": request.prompt,
            "adapters": request.adapters,
            "seed": request.seed,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
        }
        sent = urllib.request.Request(
            f"{self.address}/v1/images/generations", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        start = time.monotonic()
        for tries in range(1, MOST_TRIES + 1):
            try:
                with urllib.request.urlopen(sent, timeout=300) as answer:
                    (item,) = json.load(answer)["data"]
            except urllib.error.HTTPError as error:
                if error.code != 503 or tries == MOST_TRIES:
                    return Answer(error.code, error.read().decode(), tries=tries)
                time.sleep(float(error.headers.get("Retry-After", 1)))
            except OSError as error:
                return Answer(0, str(error), tries=tries)
            else:
                picture = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
                seconds = time.monotonic() - start
                return Answer(200, "", picture, item["replica"], item["in_memory"], tries, seconds)
        raise AssertionError

    def replicas(self) -> dict[int, float]:
        """Return the process ids of the replicas that draw, and the CPU seconds that each has used."""
        found = {
            number: seconds for number, (title, seconds) in descendants(self.process).items() if "Painter" in title
        }
        if not found:
            raise RuntimeError(f"no replica among the processes of the service: {descendants(self.process)}")
        return found

    def kill(self, replica: int) -> None:
        """Kill the process of a replica."""
        os.kill(replica, signal.SIGKILL)


@contextmanager
def running(folder: Path, *options: str) -> Generator[Service, None, None]:
    """Start the service on a free port of the loopback interface; it ends with the block.

    Args:
        folder: the folder of adapters.
        options: further options of `python -m examples.serving`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "examples.serving", f"--port={port}", f"--adapters={folder}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            if not any("ready" in line for line in process.stdout):
                raise RuntimeError("the service did not start")
            yield Service(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            process.wait(120)


def descendants(ancestor: int) -> Mapping[int, tuple[str, float]]:
    """Return the processes that a process and its children have started, with their titles and CPU seconds."""
    parents: dict[int, int] = {}
    found: dict[int, tuple[str, float]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may have spaces in it: the state, the parent, ... and the clock ticks.
            fields = status.read_text().rpartition(")")[2].split()
            title = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        number = int(status.parent.name)
        parents[number] = int(fields[1])
        found[number] = title, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_descendant(number: Any) -> bool:
        return number == ancestor or (number in parents and is_descendant(parents[number]))

    return {number: process for number, process in found.items() if number != ancestor and is_descendant(number)}
