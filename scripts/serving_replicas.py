"""One replica of the service and two: requests over HTTP, routed by Ray to a replica that has the adapter in memory."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.serving_load import zipf_requests
from scripts.serving_process import Service, running

BATCH = 8


def compare_replicas(
    adapters: Path,
    names: Sequence[str],
    rounds: int,
    requests: int,
    steps: int,
    clients: int,
    pool_bytes: int,
    counts: Sequence[int] = (1, 2),
) -> Iterator[dict[str, Any]]:
    """Yield the figures of every number of replicas in `counts`, round by round. In the first round, pools are empty.

    CPU seconds are those of the replicas, which do all the drawing. The rate is that of replicas with a core each.
    """
    for replicas in counts:
        options = (f"--replicas={replicas}", f"--samples={BATCH}", f"--slots={BATCH}", f"--pool-mib={pool_bytes >> 20}")
        with running(adapters, *options) as service:
            for number in range(rounds):
                figures = measured(service, names, requests, steps, clients, seed=number)
                yield {"what": "replicas", "replicas": replicas, "clients": clients, "round": number, **figures}


def measured(
    service: Service, names: Sequence[str], requests: int, steps: int, clients: int, seed: int
) -> dict[str, Any]:
    """Return the figures of one run of closed-loop clients; raise `RuntimeError` if a request is not answered."""
    before = service.replicas()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(service.ask, zipf_requests(names, requests, steps, seed)))
    spent = [seconds - before[process] for process, seconds in service.replicas().items()]
    failed = [answer.message for answer in answers if answer.status != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} of {requests} requests failed: {failed[0]}")
    ordered = sorted(answer.seconds for answer in answers)
    drawn = Counter(answer.replica for answer in answers)
    return {
        "pictures": requests,
        "per_second": requests / max(spent),
        "cpu_ms": 1e3 * sum(spent) / requests,
        "p50_ms": 1e3 * statistics.median(ordered),
        "p95_ms": 1e3 * ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        "in_memory": sum(answer.in_memory for answer in answers) / requests,
        "largest_share": max(drawn.values()) / requests,
    }
