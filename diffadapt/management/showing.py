"""Where adapters act, for notebooks."""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from html import escape

from diffadapt.loading.heat_map import HeatMap
from diffadapt.loading.plan import Plan
from diffadapt.loading.report import Report
from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.runtime.adapter import Adapter
from diffadapt.to_lora.sizes import change_sizes


def reported(planned: Plan, name: str) -> Report:
    """Return the report on a loaded adapter, which shows where it acts as long as it is loaded."""
    adapters = {component: weakref.ref(adapter) for component, adapter in planned.adapters.items()}

    def map_of_sizes() -> HeatMap | None:
        alive = {component: adapter for component, found in adapters.items() if (adapter := found()) is not None}
        return heat_map(alive) if alive else None

    return replace(planned.report(name), heat_map=map_of_sizes)


def heat_map(adapters: Mapping[str, Adapter]) -> HeatMap | None:
    """Return where an adapter acts, by block and projection; `None` if that cannot be said of any layer.

    Args:
        adapters: component -> the adapter of its model.
    """
    sizes = change_sizes(adapters)
    if not sizes.by_layer:
        return None
    return HeatMap.of(sizes.by_layer, "change / weight" if sizes.relative else "root mean square of the change")


def as_html(snapshot: AdapterSnapshot) -> str:
    """Return the table of adapters for a notebook, with a map for each of where it acts."""
    parts = [f"<pre>{escape(str(snapshot))}</pre>"]
    for name, loaded in snapshot.adapters.items():
        found = heat_map(loaded.components)
        if found is not None:
            parts.append(f"<details><summary>{escape(name)}</summary>{found.html()}</details>")
    return "".join(parts)
