"""Inject faults into the serving engine and the service, and compare every picture with one drawn alone before.

* damaged uploads: files that are cut off, with changed headers, of another model, or pickles;
* a slow disk: reading an adapter takes half a second more;
* bad requests among good ones: unknown adapters, strengths that are no numbers, a file that is damaged on the disk;
* a replica of the service is killed while requests are drawn.
"""

import base64
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from diffadapt.management.manager import Adapters
from examples.serving.engine import Engine, Request
from scripts import serving_adapters
from scripts.serving_load import PROMPTS
from scripts.serving_soak import TOLERANCE

BATCH = 8
KNOWN = 24
"""Number of adapters, of which most fit into the pool."""
POOL_BYTES = 24 * 2**20
DISK_DELAY = 0.5
Picture = NDArray[np.int16]


@dataclass
class Outcome:
    """What became of the requests of one fault.

    Attributes:
        sent: number of requests.
        right: answered with the picture that the request gives alone.
        refused: bad requests that were answered with an error.
        retried: answered with an error that asks to try again, and with the right picture then.
        wrong: descriptions of all others.
    """

    fault: str
    sent: int = 0
    right: int = 0
    refused: int = 0
    retried: int = 0
    wrong: tuple[str, ...] = ()

    def result(self) -> dict[str, Any]:
        """Return a line of the results."""
        counts = {"sent": self.sent, "right": self.right, "refused": self.refused, "retried": self.retried}
        return {
            "what": "faults",
            "fault": self.fault,
            **counts,
            "wrong": len(self.wrong),
            "first_wrong": self.wrong[:3],
        }

    def judge(self, answer: Any, expected: Picture | None) -> None:
        """Count an answer; `expected` is `None` if the request is bad."""
        self.sent += 1
        if expected is None:
            if isinstance(answer, Exception):
                self.refused += 1
            else:
                self.wrong += ("a bad request got a picture",)
        elif isinstance(answer, Exception):
            self.wrong += (f"{type(answer).__name__}: {answer}",)
        elif (difference := int(np.abs(np.asarray(answer, np.int16) - expected).max())) > TOLERANCE:
            self.wrong += (f"differs by {difference}",)
        else:
            self.right += 1


def run(work: Path, count: int = 1000, served: int = 40) -> Iterator[dict[str, Any]]:
    """Inject all faults and yield a result for each.

    Args:
        count: number of requests, 5 % of them bad.
        served: number of requests to the service, or 0 to leave it out.
    """
    folder = work / "faults"
    names, _ = serving_adapters.write(folder, KNOWN)
    engine = Engine(serving_adapters.PIPELINE, folder, slots=BATCH, samples=BATCH, pool_bytes=POOL_BYTES)
    requests = [Request(PROMPTS[n % 4], {name: 0.8}, seed=n, steps=1) for n, name in enumerate(names)]
    mixed = [Request(PROMPTS[n % 4], {names[n]: 0.5, names[-n]: 0.4}, seed=n, steps=1) for n in range(1, KNOWN // 2)]
    good = [(request, np.asarray(engine.draw([request])[0], np.int16)) for request in (*requests, *mixed)]
    yield damaged_uploads(engine, good, folder, names).result()
    yield slow_disk(engine, good).result()
    yield bad_requests(engine, good, folder, names, count).result()
    engine.close()
    if served:
        yield killed_replica(good, folder, served).result()


def draw_all(engine: Engine, sent: Sequence[tuple[Request, Picture | None]], outcome: Outcome) -> None:
    """Draw requests in batches and judge the answers."""
    for start in range(0, len(sent), BATCH):
        batch = sent[start : start + BATCH]
        for answer, (_, expected) in zip(engine.draw([request for request, _ in batch]), batch, strict=True):
            outcome.judge(answer, expected)


def damaged_uploads(
    engine: Engine, good: Sequence[tuple[Request, Picture]], folder: Path, names: Sequence[str]
) -> Outcome:
    """Try damaged files on the engine, and draw after each."""
    outcome, chance = Outcome("damaged uploads"), random.Random(0)
    content = (folder / f"{names[0]}.safetensors").read_bytes()
    upload = folder / "upload.partial"

    def other_model() -> None:
        save_file({"unet.no_such_layer.lora_A.weight": torch.zeros(4, 8)}, upload)

    def not_finite() -> None:
        layer = "lora_unet_conv_in"
        factors = {"lora_down": torch.full((8, 4, 3, 3), torch.inf), "lora_up": torch.ones(64, 8, 1, 1)}
        save_file({f"{layer}.{name}.weight": tensor for name, tensor in factors.items()}, upload)

    header = int.from_bytes(content[:8], "little")
    cut = [content[: chance.randrange(len(content))] for _ in range(8)]
    too_long, no_json = (2**60).to_bytes(8, "little") + content[8:], content[:8] + b"x" * header + content[8 + header :]
    contents = [*cut, too_long, no_json, pickle.dumps({"a": 1}), b""]
    files = [*(partial(upload.write_bytes, content) for content in contents), other_model, not_finite]
    for number, write in enumerate(files):
        write()
        try:
            engine.try_on(upload)
            answer: Any = None
        except Exception as error:
            answer = error
        outcome.judge(answer, None)
        draw_all(engine, [good[number % len(good)]], outcome)
    upload.unlink()
    return outcome


def slow_disk(engine: Engine, good: Sequence[tuple[Request, Picture]]) -> Outcome:
    """Draw while every adapter takes `DISK_DELAY` seconds more to read."""
    outcome = Outcome("slow disk")
    with reading_takes(DISK_DELAY):
        for start in range(0, len(good), BATCH):
            engine.prefetch([name for request, _ in good[start : start + BATCH] for name in request.adapters])
            draw_all(engine, good[start : start + BATCH], outcome)
    return outcome


@contextmanager
def reading_takes(seconds: float) -> Generator[None, None, None]:
    """Make every read of an adapter take so much longer."""
    read = Adapters.prefetch

    def slow(self: Adapters, *args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return read(self, *args, **options)

    Adapters.prefetch = slow
    try:
        yield
    finally:
        Adapters.prefetch = read


def bad_requests(
    engine: Engine, good: Sequence[tuple[Request, Picture]], folder: Path, names: Sequence[str], count: int
) -> Outcome:
    """Draw `count` requests of which every twentieth is bad, in another way each time."""
    outcome, chance = Outcome(f"{count} requests, 5 % of them bad"), random.Random(1)
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes((folder / f"{names[0]}.safetensors").read_bytes()[:5000])
    bad = [
        Request(PROMPTS[0], {"no-such-adapter": 1.0}, steps=1),
        Request(PROMPTS[0], {names[0]: float("nan")}, steps=1),
        Request(PROMPTS[0], {names[0]: {"unet.no_such_block": 1.0}}, steps=1),
        Request(PROMPTS[0], {"damaged": 1.0}, steps=1),
        Request(PROMPTS[0], dict.fromkeys(names[: BATCH + 1], 0.1), steps=1),
    ]
    sent: list[tuple[Request, Picture | None]] = []
    for number in range(count):
        is_bad = number % 20 == 7
        sent.append((bad[number // 20 % len(bad)], None) if is_bad else chance.choice(good))
    draw_all(engine, sent, outcome)
    damaged.unlink()
    return outcome


def killed_replica(good: Sequence[tuple[Request, Picture]], folder: Path, count: int, port: int = 8765) -> Outcome:
    """Start the service with two replicas, and kill one while eight clients draw."""
    outcome = Outcome("a replica is killed")
    command = [sys.executable, "-m", "examples.serving", f"--port={port}", f"--adapters={folder}", "--replicas=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as service:
        try:
            assert service.stdout is not None
            if not any("ready" in line for line in service.stdout):
                raise RuntimeError("the service did not start")
            chance = random.Random(2)
            sent = [chance.choice(good) for _ in range(count)]
            with ThreadPoolExecutor(8) as clients:
                answers = [clients.submit(ask, f"http://127.0.0.1:{port}", request) for request, _ in sent]
                next(answer for answer in answers).result()
                os.kill(chance.choice(replicas_of(service.pid)), signal.SIGKILL)
                found = [answer.result() for answer in answers]
        finally:
            service.terminate()
            service.wait(120)
    for (answer, tries), (_, expected) in zip(found, sent, strict=True):
        outcome.judge(answer, expected)
        outcome.retried += tries > 1
    return outcome


def ask(address: str, request: Request) -> tuple[Any, int]:
    """Return the picture of a request, or the error, and how often it was sent: again if the service asks for it."""
    fields = {
        "prompt": request.prompt,
        "adapters": request.adapters,
        "seed": request.seed,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    body = json.dumps(fields).encode()
    headers = {"Content-Type": "application/json"}
    for tries in range(1, 6):
        sent = urllib.request.Request(f"{address}/v1/images/generations", body, headers)
        try:
            with urllib.request.urlopen(sent, timeout=300) as answer:
                picture = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
            return Image.open(io.BytesIO(picture)), tries
        except urllib.error.HTTPError as error:
            if error.code != 503 or tries == 5:
                return RuntimeError(f"{error.code}: {error.read().decode()}"), tries
            time.sleep(float(error.headers.get("Retry-After", 1)))
        except OSError as error:
            return error, tries
    raise AssertionError("unreachable")


def replicas_of(parent: int) -> list[int]:
    """Return the process ids of the replicas that draw, among the descendants of a process."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = status.read_text().partition(" ")
            parents[int(number)] = int(rest.rpartition(")")[2].split()[1])
            names[int(number)] = (status.parent / "cmdline").read_text()
        except OSError:
            continue

    def is_descendant(number: int) -> bool:
        return number == parent or (number in parents and is_descendant(parents[number]))

    found = [number for number, name in names.items() if "Painter" in name and is_descendant(number)]
    if not found:
        raise RuntimeError(f"no replica among the processes of the service: {Counter(names.values())}")
    return found
