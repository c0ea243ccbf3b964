"""Write `docs/compatibility.md`: what becomes of files of every family, dialect and type, here and in diffusers.

Every cell is the result of a run; nothing is written by hand. How files are made and judged: `tests/support/matrix.py`
and `tests/support/judge.py`. Run it from the root of the repository:

    python -m scripts.compat_matrix                    # everything, one process per core
    python -m scripts.compat_matrix --family flux      # one family, printed and not written
    python -m scripts.compat_matrix --keys <folder>    # key lists of real files from elsewhere
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from tests.support.denoisers import SMALL
from tests.support.dialects import DIALECTS
from tests.support.judge import WRITERS, Outcome, judge
from tests.support.listed import FOREIGN, Listed, listed, refusal
from tests.support.matrix import KINDS, Workbench, files

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
KEYS = ROOT / "tests" / "fixtures" / "keys"
PEERS = ("torch", "diffusers", "transformers", "peft")

EXPLANATION = """\
Each row is one file or several, made in memory for a small model of the family, with random tensors for all layers that
the dialect has names for (linear layers, convolutions, norms; text encoders too where the dialect has them).

* **loads**: with every tensor used; or why it is refused, which leaves the models as they are.
* **equals**: the output of every layer, and after merging its weight, are those that a plain formula in float64 gives
  from the file's tensors (`tests/support/formulas.py`, within 1e-4 of the change).
* **comes back**: saved in a format and loaded again, every tensor is the same bit for bit, and so are scales and
  settings. After "as weights:" are formats that have to put layers together which were trained one by one: other
  factors, the same weights. Formats that are not there cannot hold the adapter, and saving says so.
* **diffusers**: the same file in plain diffusers with peft, by `load_lora_weights` of the family's pipeline. "yes": all
  outputs as they should be. "wrong": some are not. "drops": layers are left without their adapter, without an error.
  "refuses": an error. "no loader": the pipeline has no such method.

Which layers of a model are one in its original layout is read from the tables in `diffadapt/families/`;
`tests/families/test_families.py` holds these against diffusers' converters of whole checkpoints. Files of the dialects
are written after other programs' code (`tests/support/dialects.py`). LoRA is there in two rows: as most trainers write
it, and with another rank and alpha in every layer and on all layers that a model has. All types are: {kinds}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=SMALL, help="only these, and print instead of writing")
    parser.add_argument("--dialect", nargs="+", choices=[dialect.name for dialect in DIALECTS], help="likewise")
    parser.add_argument("--keys", type=Path, default=KEYS, help="folder with key lists of real files")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    start = time.perf_counter()
    parts = [(family, options.dialect) for family in options.family or SMALL]
    # A process of its own for every family: what peft leaves in memory goes with it.
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        outcomes: list[Outcome] = []
        for family, found in pool.imap(_judged, parts):
            outcomes += found
            print(f"{family}: {len(found)} files, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    partial = options.family is not None or options.dialect is not None
    lists = [] if partial else [listed(file) for file in sorted(options.keys.glob("*.json"))]
    page = "\n".join(_page(outcomes, lists))
    if partial:
        print(page)
    else:
        options.output.write_text(page)
    return 0


def _judged(part: tuple[str, Sequence[str] | None]) -> tuple[str, list[Outcome]]:
    family, dialects = part
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bench = Workbench(family)
    found: list[Outcome] = []
    for dialect in DIALECTS:
        if dialects is None or dialect.name in dialects:
            for file in files(bench, dialect):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(judge(bench, file, Path(folder)))
    return family, found


# The page


def _page(outcomes: Sequence[Outcome], lists: Sequence[Listed]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in PEERS)
    yield "# Compatibility\n"
    yield f"Generated by [`scripts/compat_matrix.py`](../scripts/compat_matrix.py) with {versions}. Do not edit.\n"
    yield from _summary(outcomes)
    yield EXPLANATION.format(kinds="; ".join(KINDS))
    for family in dict.fromkeys(outcome.family for outcome in outcomes):
        yield from _family(family, [outcome for outcome in outcomes if outcome.family == family])
    if lists:
        yield from _lists(lists)
    yield from _foreign()


def _summary(outcomes: Sequence[Outcome]) -> Iterator[str]:
    loaded = [outcome for outcome in outcomes if outcome.loads == "yes"]
    equal = [outcome for outcome in loaded if outcome.equals == "yes"]
    saved = sum(len(outcome.trips.saved) for outcome in loaded)
    joined = sum(len(outcome.trips.joined) for outcome in loaded)
    changed = sum(len(outcome.trips.changed) for outcome in loaded)
    families = {outcome.family for outcome in outcomes}
    dialects = {outcome.dialect for outcome in outcomes}
    peer = Counter(_verdict(outcome.diffusers) for outcome in outcomes)
    yield f"{len(outcomes)} files of {len(families)} model families in {len(dialects)} dialects:\n"
    yield f"* {len(loaded)} load with every tensor used, {len(outcomes) - len(loaded)} are refused with a reason;"
    yield f"* of those {len(equal)} equal the formulas, {len(loaded) - len(equal)} do not;"
    yield (
        f"* saved in every format that can hold them, {saved} come back bit for bit, {joined} as the same weights by "
        f"other factors, {changed} otherwise;"
    )
    yield f"* plain diffusers: {', '.join(f'{word} {peer[word]}' for word in VERDICTS)}.\n"
    yield "| family | files | load | equal | come back | diffusers: " + " | ".join(VERDICTS) + " |"
    yield "|---|---|---|---|---|" + "---|" * len(VERDICTS)
    for family in dict.fromkeys(outcome.family for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.family == family]
        good = [outcome for outcome in own if outcome.loads == "yes"]
        cells = [
            family,
            len(own),
            len(good),
            sum(outcome.equals == "yes" for outcome in good),
            sum(not outcome.trips.changed for outcome in good),
        ]
        counted = Counter(_verdict(outcome.diffusers) for outcome in own)
        yield _row([*cells, *(counted[word] or "" for word in VERDICTS)])
    yield ""
    yield "| type | files | load | equal | diffusers: " + " | ".join(VERDICTS) + " |"
    yield "|---|---|---|---|" + "---|" * len(VERDICTS)
    for kind in KINDS:
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        if own:
            counted = Counter(_verdict(outcome.diffusers) for outcome in own)
            cells = [
                kind,
                len(own),
                sum(outcome.loads == "yes" for outcome in own),
                sum(outcome.equals == "yes" for outcome in own),
            ]
            yield _row([*cells, *(counted[word] or "" for word in VERDICTS)])
    yield ""


_SHOWN = 9
"""Of so many types every one is named in a row."""

VERDICTS = ("yes", "wrong", "drops", "refuses", "no loader")


def _verdict(cell: str) -> str:
    return next(word for word in VERDICTS if cell.startswith(word))


def _family(family: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"## {family}\n"
    yield f"With `{SMALL[family].pipeline}` of diffusers.\n"
    yield "| dialect | types | loads | equals | comes back | diffusers |"
    yield "|---|---|---|---|---|---|"
    reasons: dict[str, int] = {}
    rows: dict[tuple[str, ...], list[str]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.dialect, *_cells(outcome, reasons)), []).append(outcome.kind)
    for (dialect, *cells), kinds in rows.items():
        others = [len(found) for key, found in rows.items() if key[0] == dialect]
        most = len(kinds) == max(others) and len(kinds) > _SHOWN
        yield _row([dialect, f"the other {len(kinds)}" if most and len(others) > 1 else "; ".join(kinds), *cells])
    yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason}"
    if reasons:
        yield ""


def _cells(outcome: Outcome, reasons: dict[str, int]) -> tuple[str, str, str, str]:
    """What a row says; long reasons go below the table."""

    def note(text: str) -> str:
        return f"[{reasons.setdefault(text, len(reasons) + 1)}]"

    diffusers = outcome.diffusers
    if diffusers == f"drops {outcome.tensors} of {outcome.tensors} keys":
        diffusers = "drops all keys"
    if outcome.loads != "yes":
        _, _, why = outcome.loads.partition(": ")
        return f"refused {note(_short(why or outcome.loads))}", "", "", diffusers
    equals = "yes" if outcome.equals == "yes" else f"no {note(outcome.equals)}"
    trips = outcome.trips
    back = "all" if trips.saved == WRITERS else ", ".join(trips.saved)
    if trips.joined:
        back += f"{'; ' if back else ''}as weights: {', '.join(trips.joined)}"
    for format, why in trips.changed.items():
        back += f"; not {format} {note(why)}"
    return "yes", equals, back, diffusers


def _short(reason: str) -> str:
    """Without the names of the layers, so that a reason is the same for all types."""
    return reason.rpartition(": ")[2]


def _lists(lists: Sequence[Listed]) -> Iterator[str]:
    yield "## Key lists of real files\n"
    yield "Names and shapes as they are in the files, on models of the published sizes without weights. Lists without"
    yield "shapes count the names whose layer is found. What the lists are is in their `source` and `kind`.\n"
    yield "| list | kind | format | family | tensors | used | the others |"
    yield "|---|---|---|---|---|---|---|"
    for one in lists:
        used = "" if one.used is None else f"{one.used} found" if one.by_name else one.used
        yield _row([one.name, one.kind, one.format, one.family, one.tensors, used, one.reason])
    yield ""


def _foreign() -> Iterator[str]:
    yield "## Files that are no adapters\n"
    yield "| file | recognised as | refused with |"
    yield "|---|---|---|"
    for name, keys in FOREIGN.items():
        yield _row([name, *refusal(keys)])
    yield ""


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', ' ') for cell in cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
