"""Closed-loop clients: each sends its next request when the last is answered, and one thread draws what waits."""

import random
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from examples.serving.engine import Request
from scripts.serving_peers import System

PROMPTS = (
    "a red circle on a blue background",
    "a small green star on the left, a white background",
    "a yellow heart on a black background",
    "a large purple cross on a green background",
)
Waiting = tuple[Request, "Future[Any]"]


@dataclass(frozen=True)
class Figures:
    """What the clients of one run saw.

    Attributes:
        pictures: number of pictures.
        cpu: CPU seconds of the process.
        wall: seconds that passed.
        latencies: of every request, from sending to the answer, in CPU seconds of the process. The drawing thread is
            the only one that computes, so these are the seconds of a machine on which nothing else runs.
    """

    pictures: int
    cpu: float
    wall: float
    latencies: list[float]

    def summary(self) -> dict[str, float]:
        """Return pictures per second and milliseconds."""
        ordered = sorted(self.latencies)
        return {
            "pictures": self.pictures,
            "per_second": self.pictures / self.cpu,
            "per_second_wall": self.pictures / self.wall,
            "cpu_ms": 1e3 * self.cpu / self.pictures,
            "p50_ms": 1e3 * statistics.median(ordered),
            "p95_ms": 1e3 * ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        }


def zipf_requests(names: Sequence[str], count: int, steps: int, seed: int) -> list[Request]:
    """Return requests with one adapter each, the k-th of `names` chosen 1/k as often as the first."""
    chance = random.Random(seed)
    chosen = chance.choices(names, [1 / rank for rank in range(1, len(names) + 1)], k=count)
    return [
        Request(chance.choice(PROMPTS), {name: 0.8}, seed=number, steps=steps) for number, name in enumerate(chosen)
    ]


def closed_loop(system: System, requests: Sequence[Request], clients: int) -> Figures:
    """Send all requests from `clients` threads, and draw those that wait together, `system.batch` at a time.

    Raises:
        Exception: a request failed; the first one.
    """
    queue: SimpleQueue[Waiting | None] = SimpleQueue()
    todo: SimpleQueue[Request] = SimpleQueue()
    for request in requests:
        todo.put(request)
    latencies: list[float] = []
    failures: list[BaseException] = []

    def send() -> None:
        while not failures:
            try:
                request = todo.get_nowait()
            except Empty:
                return
            answer: Future[Any] = Future()
            start = time.process_time()
            queue.put((request, answer))
            try:
                answer.result()
            except Exception as error:
                failures.append(error)
            latencies.append(time.process_time() - start)

    threads = [threading.Thread(target=send) for _ in range(clients)]
    cpu, wall = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    closing = threading.Thread(target=lambda: [*(thread.join() for thread in threads), queue.put(None)])
    closing.start()
    while (first := queue.get()) is not None:
        waiting = [first]
        # A client that was just answered sends its next request within microseconds.
        deadline = time.perf_counter() + 0.005
        while len(waiting) < min(system.batch, clients):
            try:
                further = queue.get(timeout=max(0.0, deadline - time.perf_counter()))
            except Empty:
                break
            if further is None:
                queue.put(None)
                break
            waiting.append(further)
        try:
            pictures = system.draw([request for request, _ in waiting])
            for (_, answer), picture in zip(waiting, pictures, strict=True):
                answer.set_result(picture)
        except Exception as error:
            for _, answer in waiting:
                answer.set_exception(error)
    closing.join()
    if failures:
        raise failures[0]
    return Figures(len(requests), time.process_time() - cpu, time.perf_counter() - wall, latencies)
