"""Use one serving engine from 16 threads for an hour, and watch its memory, its pictures and the base weights.

The threads draw batches of mixed requests, upload, try and delete adapters, and load, swap, activate and remove others
on the same pipeline. Every picture is compared with one that the same request gave alone, before the
threads started. At the end, all adapters are removed and every weight is compared with a fresh pipeline, bit for bit.

Every minute appends a line to the log. A run that was interrupted continues until its minutes add up.

    nice -n 19 python -m scripts.serving_soak [--minutes 60] [--threads 16] [--work .cache/bench_serving]
"""

import argparse
import json
import os
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import nn

from examples.serving.engine import Engine, Request
from scripts import serving_adapters

PROMPTS = ("a red circle on a blue background", "a small green star on the left, a white background")
TOLERANCE = 3
"""Largest difference from the picture alone, of 255: a batch rounds otherwise than a single row."""

Picture = NDArray[np.int16]


@dataclass
class Tally:
    """What the threads have done so far.

    Attributes:
        done: number of actions by kind, and of pictures.
        wrong: descriptions of pictures that differ from the expected ones, and of errors.
        difference: largest difference of a picture from the expected one, of 255.
    """

    done: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    difference: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, what: str, found: Any, expected: Picture) -> None:
        """Count a picture, and note it if it is an error or differs from `expected`."""
        if isinstance(found, Exception):
            difference = 256
        else:
            difference = int(np.abs(np.asarray(found, np.int16) - expected).max())
        with self.lock:
            self.done["pictures"] += 1
            if difference > TOLERANCE:
                self.wrong.append(f"{what}: {found if difference == 256 else f'differs by {difference}'}")
            else:
                self.difference = max(self.difference, difference)


def catalogue(names: Sequence[str], count: int) -> list[Request]:
    """Return `count` different requests: no adapter, one, a mix of two, and one by blocks, for one to three steps."""
    chance = random.Random(0)
    requests: list[Request] = []
    for number in range(count):
        first, second = chance.sample(list(names), 2)
        by_block = {"unet.up_blocks": 0.4, "": 0.9}
        mixes: list[Mapping[str, Any]] = [{first: 1.0}, {first: 0.5, second: 0.7}, {first: by_block}, {}]
        requests.append(Request(PROMPTS[number % 2], mixes[number % 4], seed=number, steps=1 + number % 3))
    return requests


def actions(
    engine: Engine, requests: Sequence[Request], expected: Sequence[Picture], names: Sequence[str], tally: Tally
) -> Mapping[str, tuple[int, Callable[[random.Random, str], None]]]:
    """Return what a thread may do: name -> how often, and a function of its random numbers and its own name."""
    adapters = engine.pipe.adapters
    plain = [number for number, request in enumerate(requests) if len(request.adapters) == 1]

    def draw(chance: random.Random, own: str) -> None:
        chosen = chance.sample(range(len(requests)), chance.randint(1, 4))
        for number, picture in zip(chosen, engine.draw([requests[n] for n in chosen]), strict=True):
            tally.compare(f"draw {requests[number]}", picture, expected[number])

    def prefetch(chance: random.Random, own: str) -> None:
        engine.prefetch(chance.sample(list(names), 3))

    def upload(chance: random.Random, own: str) -> None:
        # The same adapter under another name gives the same picture.
        number = chance.choice(plain)
        request = requests[number]
        ((name, strength),) = request.adapters.items()
        file = engine.folder.folder / f"{own}.upload"
        copyfile(engine.folder.path(name), file)
        engine.try_on(file)
        engine.folder.publish(file, own)
        renamed = Request(request.prompt, {own: strength}, request.seed, request.steps)
        tally.compare(f"upload of {name}", engine.draw([renamed])[0], expected[number])
        engine.folder.remove(own)

    def own_adapter(chance: random.Random, own: str) -> None:
        number = chance.choice(plain)
        request = requests[number]
        ((name, strength),) = request.adapters.items()
        loaded = f"{own}-loaded"
        adapters.load(engine.folder.path(chance.choice(list(names))), loaded, activate=False)
        try:
            adapters.hotswap(loaded, engine.folder.path(name))
            with adapters.activated({loaded: strength}):
                generator = torch.Generator().manual_seed(request.seed)
                drawn = engine.pipe(
                    request.prompt,
                    generator=generator,
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    output_type="np",
                ).images[0]
        finally:
            adapters.remove(loaded)
        tally.compare(f"hotswap to {name}", (drawn * 255).round(), expected[number])

    def damaged(chance: random.Random, own: str) -> None:
        file = engine.folder.folder / f"{own}.damaged"
        content = engine.folder.path(chance.choice(list(names))).read_bytes()
        file.write_bytes(content[: chance.randrange(len(content))])
        try:
            engine.try_on(file)
        except Exception:
            return
        finally:
            file.unlink()
        with tally.lock:
            tally.wrong.append(f"{own}: a damaged file was accepted")

    return {
        "draw": (14, draw),
        "prefetch": (2, prefetch),
        "upload": (1, upload),
        "own_adapter": (2, own_adapter),
        "damaged": (1, damaged),
    }


def run(work: Path, minutes: float, threads: int, log: Path, count: int = 200, catalogued: int = 48) -> dict[str, Any]:
    """Run the threads until the minutes in the log add up to `minutes`, and return the last line of the log."""
    folder = work / "soak"
    names, _ = serving_adapters.write(folder, count)
    pool_bytes = 40 * 2**20
    engine = Engine(serving_adapters.PIPELINE, folder, slots=8, samples=8, pool_bytes=pool_bytes)
    requests = catalogue(names, catalogued)
    expected = [np.asarray(alone(engine, request), np.int16) for request in requests]
    before = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    spent = before[-1]["minutes"] if before else 0.0
    tally, stop = Tally(), threading.Event()
    todo = actions(engine, requests, expected, names, tally)
    weights = [weight for weight, _ in todo.values()]

    def work_on(number: int) -> None:
        chance = random.Random(time.time_ns() + number)
        while not stop.is_set():
            ((what, (_, act)),) = chance.choices(list(todo.items()), weights)
            try:
                act(chance, f"thread-{number}")
            except Exception as error:
                with tally.lock:
                    tally.wrong.append(f"{what}: {''.join(traceback.format_exception(error))}")
            with tally.lock:
                tally.done[what] += 1

    workers = [threading.Thread(target=work_on, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    start = time.monotonic()
    line: dict[str, Any] = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    while not stop.is_set():
        left = 60 * (minutes - spent) - (time.monotonic() - start)
        stop.wait(max(0.0, min(60.0, left)))
        if left <= 60:
            stop.set()
            for worker in workers:
                worker.join()
        line = {
            "minutes": round(spent + (time.monotonic() - start) / 60, 2),
            "resident_mib": resident_bytes() >> 20,
            "pool_mib": engine.pool.bytes >> 20,
            "cpu_s": round(time.process_time()),
            "process": os.getpid(),
            **tally.done,
            "difference": tally.difference,
            "wrong": len(tally.wrong),
            "first_wrong": tally.wrong[:3],
        }
        if stop.is_set():
            engine.close()
            line["drift"] = drift(engine.pipe)
            line["left_behind"] = engine.pipe.adapters.names
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def alone(engine: Engine, request: Request) -> Any:
    """Return the picture of a request that is drawn alone."""
    picture = engine.draw([request])[0]
    if isinstance(picture, Exception):
        raise picture
    return picture


def drift(pipe: StableDiffusionPipeline) -> list[str]:
    """Return the weights and buffers that differ from those of a fresh pipeline, and layers of other classes."""
    fresh = StableDiffusionPipeline.from_pretrained(serving_adapters.PIPELINE, local_files_only=True)
    changed: list[str] = []
    for component, model in fresh.components.items():
        if isinstance(model, nn.Module):
            used: nn.Module = getattr(pipe, component)
            found, wanted = used.state_dict(), model.state_dict()
            changed += [f"{component}.{key}" for key in sorted(found.keys() ^ wanted.keys())]
            changed += [f"{component}.{key}" for key in found.keys() & wanted.keys() if not same(found, wanted, key)]
            classes = {path: type(module) for path, module in model.named_modules()}
            changed += [
                f"{component}.{path}: {type(module)}"
                for path, module in used.named_modules()
                if classes.get(path) is not type(module)
            ]
    return changed


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], key: str) -> bool:
    """Return whether two tensors have the same bits."""
    return found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key])


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run and print the last line of the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="minutes in all (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=16, help="threads at once (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".cache/bench_serving"), help="folder of adapters and log")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(options.work, options.minutes, options.threads, options.work / "soak.jsonl"), indent=1))


if __name__ == "__main__":
    main()
