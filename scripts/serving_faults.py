"""Inject faults into the serving engine and the service, and compare every picture with one drawn alone before.

* damaged uploads: files that are cut off, with changed headers, of another model, or pickles;
* a slow disk: reading an adapter takes half a second more;
* bad requests among good ones: unknown adapters, strengths that are no numbers, a file that is damaged on the disk;
* a replica of the service is killed while good and bad requests come over HTTP.
"""

import pickle
import random
import time
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
from safetensors.torch import save_file

from diffadapt.management.manager import Adapters
from examples.serving.engine import Engine, Request
from scripts import serving_adapters
from scripts.serving_load import PROMPTS
from scripts.serving_process import running
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


def run(work: Path, count: int = 1000, served: int = 400) -> Iterator[dict[str, Any]]:
    """Inject all faults and yield a result for each.

    Args:
        count: number of requests, 5 % of them bad.
        served: number of requests over HTTP, 5 % of them bad, or 0 to leave the service out.
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
        yield killed_replica(good, folder, names, served).result()


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
    with damaged_adapter(folder, names) as damaged:
        bad = bad_ones(names, damaged)
        sent: list[tuple[Request, Picture | None]] = [chance.choice(good) for _ in range(count)]
        for number in range(7, count, 20):
            sent[number] = bad[number // 20 % len(bad)], None
        draw_all(engine, sent, outcome)
    return outcome


@contextmanager
def damaged_adapter(folder: Path, names: Sequence[str]) -> Generator[str, None, None]:
    """Put a file that is cut off into the folder; yield its name."""
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes((folder / f"{names[0]}.safetensors").read_bytes()[:5000])
    try:
        yield "damaged"
    finally:
        damaged.unlink()


def bad_ones(names: Sequence[str], damaged: str) -> list[Request]:
    """Return requests that cannot be drawn, each for another reason."""
    return [
        Request(PROMPTS[0], {"no-such-adapter": 1.0}, steps=1),
        Request(PROMPTS[0], {names[0]: float("nan")}, steps=1),
        Request(PROMPTS[0], {names[0]: {"unet.no_such_block": 1.0}}, steps=1),
        Request(PROMPTS[0], {damaged: 1.0}, steps=1),
        Request(PROMPTS[0], dict.fromkeys(names[: BATCH + 1], 0.1), steps=1),
    ]


def killed_replica(good: Sequence[tuple[Request, Picture]], folder: Path, names: Sequence[str], count: int) -> Outcome:
    """Send `count` requests to two replicas from eight clients, 5 % of them bad, and kill one of the replicas."""
    outcome, chance = Outcome(f"{count} requests over HTTP, 5 % of them bad, and a replica is killed"), random.Random(2)
    sent: list[tuple[Request, Picture | int]] = [chance.choice(good) for _ in range(count)]
    with damaged_adapter(folder, names) as damaged:
        bad = [*zip(bad_ones(names, damaged), (404, 422, 422, 422, 422), strict=True)]
        for number in range(7, count, 20):
            sent[number] = bad[number // 20 % len(bad)]
        with running(folder, "--replicas=2") as service, ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(service.ask, request) for request, _ in sent]
            answers[count // 4].result()
            service.kill(chance.choice([*service.replicas()]))
            found = [answer.result() for answer in answers]
    for answer, (_, expected) in zip(found, sent, strict=True):
        failure = RuntimeError(f"{answer.status}: {answer.message}")
        if not isinstance(expected, int):
            outcome.judge(failure if answer.picture is None else answer.picture, expected)
        elif answer.status not in (200, expected):
            outcome.sent += 1
            outcome.wrong += (f"{failure}, expected {expected}",)
        else:
            outcome.judge(answer.picture or failure, None)
        outcome.retried += answer.tries > 1
    return outcome
