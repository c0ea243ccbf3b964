"""Write `docs/compatibility.md`: which files of every family, dialect and type load, here and in diffusers.

Every cell is the result of a run; nothing is written by hand. `tests/support/matrix.py` makes the files, and
`tests/support/judge.py` judges them; `tests/support/base_judge.py` judges adapters on quantised weights. Run it from
the root of the repository:

    python -m scripts.compat_matrix                    # every family, one process per core
    python -m scripts.compat_matrix --bases            # quantised and cast weights: their section is replaced
    python -m scripts.compat_matrix --bases gguf hqq   # these bases, printed and not written
    python -m scripts.compat_matrix --family flux      # one family, printed and not written
    python -m scripts.compat_matrix --keys <folder>    # key lists of real files from elsewhere

Outcomes are kept in `.cache/matrix/` (`scripts/matrix_cache.py`). A run that was interrupted goes on where it was, and
what did not change since the last run is not judged again.
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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from scripts import base_table
from scripts.matrix_cache import PEERS, ROOT, Kept
from tests.support.denoisers import SMALL
from tests.support.dialects import DIALECTS, Dialect
from tests.support.judge import WRITERS, Outcome, judge
from tests.support.listed import FOREIGN, Listed, listed, refusal
from tests.support.matrix import KINDS, Workbench, file_of

PAGE = ROOT / "docs" / "compatibility.md"
KEYS = ROOT / "tests" / "fixtures" / "keys"

ON_ALL_LAYERS = ("LoRA in blocks, one alpha", "LoRA")
"""Types whose files have all layers. They show that all names are found, whatever the type."""

EXPLANATION = """\
Each row stands for one file or several. Files are made in memory for a small model of the family, with random tensors
for the layers that the dialect has names for: linear layers, convolutions and norms, and layers of the text encoders
where the dialect covers them. LoRA is on all of these layers, each other type on one layer of every shape.

* **loads**: whether the file loads with every tensor used, or why it is refused. A refused file leaves the models as
  they are.
* **equals**: whether the output of every layer, and its weight after merging, equal what a plain formula in float64
  computes from the tensors of the file (`tests/support/formulas.py`, `peft_formulas.py`), within 1e-4 of the change.
* **comes back**: the formats in which the adapter can be saved and loaded again with every tensor the same bit for bit,
  and the same scales and settings. Formats after "as weights:" have to fuse layers that were trained one by one: the
  weights come back, but as other factors. Formats that are not listed cannot hold the adapter; saving in them raises an
  error.
* **diffusers**: the same file in plain diffusers with peft, loaded by `load_lora_weights` of the family's pipeline.
  "yes": all outputs are correct. "wrong": some are not. "drops": layers stay without their adapter, without an error.
  "refuses": it raises an error. "no loader": the pipeline has no such method.

The tables in `diffadapt/families/` say which layers of a model are fused in its original layout;
`tests/families/test_families.py` checks them against diffusers' converters of whole checkpoints. Files of each dialect
are written as the code of other programs writes them (`tests/support/dialects.py`). LoRA has two rows: as most trainers
write it, and with another rank and alpha in every layer, on all layers of the model. The types are: {kinds}.
"""


def main() -> int:
    """Judge all files that the options select, and write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    selection: dict[str, list[str]] = {"family": [*SMALL], "dialect": [dialect.name for dialect in DIALECTS]}
    for option, names in selection.items():
        text = f"print the page for these only, and write nothing: {'; '.join(names)}"
        parser.add_argument(f"--{option}", nargs="+", choices=names, metavar="NAME", help=text)
    parser.add_argument("--keys", type=Path, default=KEYS, help="folder of key lists (default: tests/fixtures/keys)")
    parser.add_argument("--output", type=Path, default=PAGE, help="page to write (default: docs/compatibility.md)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU core)")
    text = "rewrite the section about quantised weights only; with names, print the part for these bases"
    parser.add_argument("--bases", nargs="*", metavar="NAME", help=text)
    parser.add_argument("--again", action="store_true", help="judge again what was judged with the same code")
    text = "use kept outcomes, even of other versions of the library, and judge only files without one"
    parser.add_argument("--kept", action="store_true", help=text)
    options = parser.parse_args()
    if options.bases is not None:
        return _bases(options.bases, options.output, options.jobs)
    start = time.perf_counter()
    parts = [(family, options.dialect, options.kept, options.again) for family in options.family or SMALL]
    # Every family gets a process of its own, which frees what peft leaves in memory when it ends.
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
        _, heading, bases = PAGE.read_text().partition(base_table.HEADING)
        options.output.write_text(f"{page.rstrip()}\n\n{heading}{bases}")
    return 0


def _bases(names: Sequence[str], page: Path, jobs: int) -> int:
    """Judge adapters on quantised weights, and replace the section about them, which is the last of the page."""
    section = "\n".join(base_table.section(base_table.outcomes(jobs, names)))
    if names:
        print(section)
    else:
        before, _, _ = page.read_text().partition(base_table.HEADING)
        page.write_text(f"{before.rstrip()}\n\n{section}")
    return 0


def _judged(part: tuple[str, Sequence[str] | None, bool, bool]) -> tuple[str, list[Outcome]]:
    """Judge all files of a family, or those of some dialects, and return the family with the outcomes.

    Outcomes are kept after every dialect.
    """
    family, dialects, any_code, again = part
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bench, kept, found = Workbench(family), Kept(family, any_code=any_code, again=again), list[Outcome]()
    for dialect in DIALECTS:
        if dialects is None or dialect.name in dialects:
            own = [_outcome(bench, dialect, kind, kept) for kind in KINDS]
            found += [outcome for outcome in own if outcome is not None]
            kept.write()
    return family, found


def _outcome(bench: Workbench, dialect: Dialect, kind: str, kept: Kept) -> Outcome | None:
    """Judge the file of one type, or return the outcome that is kept; `None` if there is no such file."""
    if kept.knows(dialect.name, kind):
        return kept.outcome(dialect.name, kind)
    file, outcome = file_of(bench, dialect, kind, of_each_shape=kind not in ON_ALL_LAYERS), None
    if file is not None:
        peer = kept.of_diffusers(dialect.name, kind)
        with tempfile.TemporaryDirectory() as folder:
            outcome = judge(bench, file, Path(folder), peer=peer is None)
        outcome = outcome if peer is None else replace(outcome, diffusers=peer)
    kept.keep(dialect.name, kind, outcome)
    return outcome


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
    yield f"* of these, {len(equal)} equal the formulas, {len(loaded) - len(equal)} do not;"
    yield (
        f"* saved in every format that can hold them, {saved} come back bit for bit, {joined} as other factors of the "
        f"same weights, and {changed} changed;"
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
"""A row names up to this many types; more become "the other ..." if it is the longest row of its dialect."""

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
    """Return the last four cells of a row; long reasons become numbers, and are listed below the table."""

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
    """Return a reason without the path of the layer, so that it is the same for all types."""
    return reason.rpartition(": ")[2]


def _lists(lists: Sequence[Listed]) -> Iterator[str]:
    yield "## Key lists of real files\n"
    yield "Names and shapes of real files, resolved against models of the published sizes without weights. For lists"
    yield "without shapes, the names whose layer is found are counted. Each list states its `source` and `kind`.\n"
    yield "| list | kind | format | family | tensors | used | why not the others |"
    yield "|---|---|---|---|---|---|---|"
    for one in lists:
        used = "" if one.used is None else f"{one.used} found" if one.by_name else one.used
        yield _row([one.name, one.kind, one.format, one.family, one.tensors, used, one.reason])
    yield ""


def _foreign() -> Iterator[str]:
    yield "## Files that are not adapters\n"
    yield "| file | recognised as | error |"
    yield "|---|---|---|"
    for name, keys in FOREIGN.items():
        yield _row([name, *refusal(keys)])
    yield ""


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', ' ') for cell in cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
