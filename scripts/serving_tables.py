"""The tables of docs/serving.md, from the results of `bench_serving` and the log of `serving_soak`."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "serving.md"
OURS, SERIAL = "ours, batched", "diffusers, resident"

Result = dict[str, Any]


def write_page(work: Path, page: Path = PAGE) -> None:
    """Write the tables between the markers of the page. A table without results stays as it is.

    Args:
        work: the folder with `results.jsonl` and `soak.jsonl`.
        page: the page; its markers are `<!-- NAME: ... -->` and `<!-- end of NAME -->`.
    """
    results = lines_of(work / "results.jsonl")
    tables = {
        "speed": speed([r for r in results if r["what"] == "systems"]),
        "goals": goals(results),
        "faults": faults([r for r in results if r["what"] == "faults"]),
        "soak": soak(lines_of(work / "soak.jsonl")),
    }
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        if table:
            start = text.index("-->", text.index(f"<!-- {name}:")) + len("-->")
            text = f"{text[:start]}\n\n{table}\n\n{text[text.index(f'<!-- end of {name} -->') :]}"
    page.write_text(text, encoding="utf-8")


def lines_of(file: Path) -> list[Result]:
    """Return the JSON lines of a file; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def speed(results: Sequence[Result]) -> str:
    """Return the table of all systems and numbers of clients."""
    if not results:
        return ""
    rows = ["| clients | | pictures/s | CPU ms per picture | p50 ms | p95 ms |", "|---" * 6 + "|"]
    for clients in sorted({r["clients"] for r in results}, reverse=True):
        for system in dict.fromkeys(r["system"] for r in results):
            own = [r for r in results if r["clients"] == clients and r["system"] == system]
            if own:
                cells = (median(own, key) for key in ("cpu_ms", "p50_ms", "p95_ms"))
                rate = f"{median(own, 'per_second'):.2f}"
                rows.append(f"| {clients} | {system} | {rate} | {' | '.join(f'{value:.0f}' for value in cells)} |")
    rounds = len({r["round"] for r in results})
    pictures = {r["clients"]: r["pictures"] for r in results}
    counts = ", ".join(
        f"{pictures[clients]} pictures with {clients} client{'s' * (clients > 1)}"
        for clients in sorted(pictures, reverse=True)
    )
    versions = ", ".join(f"{name} {number}" for name, number in results[-1]["versions"].items())
    times = "One round" if rounds == 1 else f"Medians of {rounds} rounds"
    note = f"{times}: {counts}, {results[-1]['steps']} steps each; {versions}."
    return "\n".join([*rows, "", note])


def goals(results: Sequence[Result]) -> str:
    """Return the table of the goals and what was measured; a goal that was not measured has no row."""
    crowded = [r for r in results if r["what"] == "systems" and r["clients"] == 16]
    rows = [r for r in results if r["what"] == "rows" and not r["compiled"]]
    compiled = [r for r in results if r["what"] == "rows" and r["compiled"]]
    counts = [r for r in results if r["what"] == "counts"]

    def named(key: str, value: object) -> Callable[[Result], bool]:
        return lambda result: result[key] == value

    mixed, single = named("batch", "mixed adapters"), named("batch", "one adapter")
    measured = [
        (
            "throughput at 16 clients, next to diffusers with all adapters resident",
            "at least 4",
            ratio(crowded, "per_second", named("system", OURS), named("system", SERIAL)),
        ),
        (
            "p95 at 16 clients, next to the same",
            "at most 0.33",
            ratio(crowded, "p95_ms", named("system", OURS), named("system", SERIAL)),
        ),
        (
            "a batch with an adapter per row, next to one adapter for all",
            "at most 1.25",
            ratio(rows, "cpu_ms", mixed, single),
        ),
        ("the same, compiled", "at most 1.25", ratio(compiled, "cpu_ms", mixed, single)),
        (
            "p95 with 200 adapters, next to 4",
            "at most 1.3",
            ratio(counts, "p95_ms", lambda r: r["adapters"] != 4, named("adapters", 4)),
        ),
    ]
    lines = [f"| {what} | {goal} | {found:.2f} |" for what, goal, found in measured if found is not None]
    return "\n".join(["| ratio | goal | measured |", "|---|---|---|", *lines]) if lines else ""


def faults(results: Sequence[Result]) -> str:
    """Return the table of the faults, with the last result of each."""
    if not results:
        return ""
    latest = {r["fault"]: r for r in results}
    rows = [
        "| fault | requests | right pictures | refused, as they should | sent again | wrong or lost |",
        "|---" * 6 + "|",
    ]
    for fault, r in latest.items():
        cells = (r[key] for key in ("sent", "right", "refused", "retried", "wrong"))
        rows.append(f"| {fault} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def soak(log: Sequence[Result]) -> str:
    """Return the table of the soak, if it has ended."""
    if not log or "drift" not in log[-1]:
        return ""
    last, settled = log[-1], [r["resident_mib"] for r in log if r["minutes"] >= log[-1]["minutes"] / 3]
    rows = {
        "minutes": f"{last['minutes']:.0f}",
        "CPU seconds": last["cpu_s"],
        "pictures, each compared with its twin": last["pictures"],
        "largest difference from the twin, of 255": last["difference"],
        "wrong pictures and errors": last["wrong"],
        "adapters uploaded and deleted": last.get("upload", 0),
        "adapters loaded, swapped and removed directly": last.get("own_adapter", 0),
        "damaged uploads refused": last.get("damaged", 0),
        "resident MiB after a third, highest after that, at the end": f"{settled[0]}, {max(settled)}, {settled[-1]}",
        "base weights and layer classes that differ at the end": len(last["drift"]),
        "adapters left behind": len(last["left_behind"]),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())])


def median(results: Iterable[Result], key: str) -> float:
    """Return the median of one figure."""
    return statistics.median(r[key] for r in results)


def ratio(
    results: Sequence[Result], key: str, top: Callable[[Result], bool], bottom: Callable[[Result], bool]
) -> float | None:
    """Return the median over the rounds of the quotient of two results of one round; `None` without results."""
    tops, bottoms = ({r["round"]: r[key] for r in results if chosen(r)} for chosen in (top, bottom))
    quotients = [tops[number] / bottoms[number] for number in tops.keys() & bottoms.keys()]
    return statistics.median(quotients) if quotients else None
