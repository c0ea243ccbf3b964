"""Benchmark serving 200 adapters on the embedded pipeline: this library's engine against diffusers with peft.

Clients ask for pictures with one adapter each, whose popularity follows Zipf's law, and wait for every answer
(`serving_load.py`). The systems take turns in every round:

* ours, batched: requests that wait are drawn together, each row with its own adapter;
* ours, one by one: the same without batches;
* diffusers, resident: all adapters stay in the UNet, and every request calls `set_adapters`;
* diffusers, loading: a request loads its adapter from the file, under the byte budget of our pool.

The 200 adapters are LoRAs, DoRAs, LoHas, LoKrs and IA3s. diffusers has no loader for three of these types, so it gets
the LoRAs that the others were made from. Times are CPU time of the process with one thread, which other work on the
machine distorts little; on an idle machine they are those of the clock.

    python -m scripts.bench_serving [--quick] [--rounds 3] [--compiled inductor]     # measure, append to the results
    python -m scripts.bench_serving --faults       # kill a replica, damage files, slow the disk, send bad requests
    python -m scripts.bench_serving --report       # write the tables of docs/serving.md from the results
"""

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scripts import serving_adapters
from scripts.serving_load import closed_loop, zipf_requests
from scripts.serving_peers import Loading, Ours, Resident, System
from scripts.serving_replicas import compare_replicas
from scripts.serving_tables import write_page

BATCH = 16
CLIENTS = (1, 4, 16)
POOL_BYTES = 64 * 2**20
"""Bytes of adapters in memory; all 200 have about three times as many."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")

Result = dict[str, Any]


def systems(adapters: Path, names: Sequence[str], pool_bytes: int) -> dict[str, Callable[[], System]]:
    """Return the functions that set up the systems that are compared, by name."""
    loras = adapters / "lora"
    return {
        "ours, batched": lambda: Ours(adapters, batch=BATCH, pool_bytes=pool_bytes),
        "ours, one by one": lambda: Ours(adapters, batch=1, pool_bytes=pool_bytes),
        "diffusers, resident": lambda: Resident(loras, names),
        "diffusers, loading": lambda: Loading(loras, pool_bytes),
    }


def compare(
    adapters: Path, names: Sequence[str], rounds: int, requests: int, steps: int, all_clients: Sequence[int]
) -> Iterator[Result]:
    """Yield the figures of every system with every number of clients, round by round."""
    made = {name: make() for name, make in systems(adapters, names, POOL_BYTES).items()}
    for name, system in made.items():
        system.draw(zipf_requests(names, 1, 1, seed=0))
        print(f"{name} is ready", file=sys.stderr)
    for number in range(rounds):
        for clients in all_clients:
            # A single client has a system for itself, so fewer requests say as much.
            count = max(6, requests * clients // max(all_clients))
            for name, system in made.items():
                gc.collect()
                figures = closed_loop(system, zipf_requests(names, count, steps, seed=number), clients).summary()
                yield {"what": "systems", "system": name, "clients": clients, "round": number, **figures}
    for system in made.values():
        system.close()


def compare_batches(
    adapters: Path, names: Sequence[str], rounds: int, steps: int, compiled: bool | str
) -> Iterator[Result]:
    """Yield the CPU time of a full batch with one adapter, and with a different one in every row."""
    size = 8 if compiled else BATCH
    folder = adapters
    if compiled:
        # Slots are reserved for every file of a folder.
        folder = adapters.parent / "few"
        few, _ = serving_adapters.write(folder, 2 * size)
        names = few
    ours = Ours(folder, batch=size, pool_bytes=2**30, compiled=compiled)
    requests = zipf_requests(names, size, steps, seed=0)
    batches = {
        "one adapter": [with_adapter(request, names[0]) for request in requests],
        "mixed adapters": [with_adapter(request, name) for request, name in zip(requests, names, strict=False)],
    }
    for number in range(-1, rounds):
        for name, batch in batches.items():
            figures = closed_loop(ours, batch, size).summary()
            # The first round compiles, and reads the adapters.
            if number >= 0:
                yield {"what": "rows", "batch": name, "compiled": compiled, "round": number, "rows": size, **figures}
    ours.close()


def compare_counts(adapters: Path, names: Sequence[str], rounds: int, count: int, steps: int) -> Iterator[Result]:
    """Yield the latency with 4 adapters, which all stay in memory, and with all, most of which are on disk."""
    ours = Ours(adapters, batch=BATCH, pool_bytes=POOL_BYTES)
    ours.draw(zipf_requests(names, BATCH, 1, seed=0))
    for number in range(rounds):
        for known in (4, len(names)):
            figures = closed_loop(ours, zipf_requests(names[:known], count, steps, seed=number), BATCH).summary()
            yield {"what": "counts", "adapters": known, "round": number, **figures}
    ours.close()


def with_adapter(request: Any, name: str) -> Any:
    """Return the request with another adapter."""
    return type(request)(request.prompt, {name: 0.8}, request.seed, request.steps)


def append(file: Path, results: Iterable[Result], steps: int) -> None:
    """Append results to the file as they come, with the versions that they were measured with, and print them."""
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    file.parent.mkdir(parents=True, exist_ok=True)
    for result in results:
        print(json.dumps(result), file=sys.stderr)
        with file.open("a") as lines:
            lines.write(json.dumps({**result, "steps": steps, "versions": versions}) + "\n")


def main() -> None:
    """Measure, inject faults, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds to measure (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=64, help="requests per run with 16 clients (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a picture (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=200, help="number of adapters (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="*", default=CLIENTS, help="numbers of clients")
    parser.add_argument("--only", choices=("systems", "rows", "counts", "replicas"), help="measure one of the parts")
    parser.add_argument("--compiled", default="", help="backend to measure a compiled batch with, such as inductor")
    parser.add_argument("--quick", action="store_true", help="one round with 16 clients and few requests")
    parser.add_argument("--faults", action="store_true", help="inject faults instead")
    parser.add_argument("--report", action="store_true", help="write docs/serving.md from the results")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/bench_serving"), help="folder of adapters and results"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = options.work / "results.jsonl"
    if options.report:
        write_page(options.work)
        return
    if options.faults:
        from scripts import serving_faults

        append(results, serving_faults.run(options.work), steps=1)
        return
    if options.quick:
        options.rounds, options.requests, options.clients = 1, 32, (16,)
    adapters = options.work / "adapters"
    names, _ = serving_adapters.write(adapters, options.adapters)
    steps = options.steps
    if options.compiled:
        append(results, compare_batches(adapters, names, options.rounds, steps, options.compiled), steps)
        return
    if options.only in (None, "rows"):
        append(results, compare_batches(adapters, names, options.rounds, steps, False), steps)
    if options.only in (None, "counts"):
        append(results, compare_counts(adapters, names, options.rounds, options.requests, steps), steps)
    if options.only in (None, "systems"):
        compared = compare(adapters, names, options.rounds, options.requests, steps, options.clients)
        append(results, compared, steps)
    if options.only in (None, "replicas"):
        served = compare_replicas(adapters, names, options.rounds, options.requests, steps, BATCH, POOL_BYTES)
        append(results, served, steps)


if __name__ == "__main__":
    main()
