"""Check on a CUDA device what only such a device can show, and print one table. It takes five minutes at most.

Swaps in CUDA graphs and under `mode="reduce-overhead"` (no address changes, nothing is recorded again), prefetching
into pinned memory, group offloading with streams, the kernels of bitsandbytes and torchao, merging with exact undo on
both devices, the error of every adapter type in half precision, and the speed of models of SDXL's and Flux' shape.
Without CUDA, it says that nothing was checked. The exit code is 1 if a row is wrong.

    python -m scripts.gpu_check [--minutes 5] [--only NAME ...]
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from scripts import gpu_parts, gpu_speed
from scripts.gpu_parts import Row, Setting, guarded, release

PACKAGES = ("torch", "diffusers", "peft", "bitsandbytes", "torchao")
Part = Callable[[Setting], Iterable[Row]]

PARTS: dict[str, Part] = {
    "graphs": gpu_parts.swaps_of_compiled_models,
    "prefetch": gpu_parts.prefetching,
    "offload": gpu_parts.group_offloading,
    "backends": gpu_parts.backends,
    "merge": gpu_parts.merging,
    "precision": gpu_parts.half_precision,
    "flux": gpu_speed.flux_speed,
    "unet": gpu_speed.unet_speed,
}
"""The parts by name, the quick ones first."""


def rows_of(setting: Setting, parts: Mapping[str, Part], seconds: float) -> Iterable[tuple[str, Row]]:
    """Yield the rows of all parts with the names of the parts. What does not start in time is left out and said to be.

    Args:
        setting: where the parts run.
        parts: the parts by name.
        seconds: the time after which nothing new is started.
    """
    start = time.monotonic()
    for name, part in parts.items():
        if time.monotonic() - start > seconds:
            yield name, Row("left out", f"{seconds / 60:.1f} minutes are over")
            continue
        for row in guarded(name, partial(part, setting)):
            yield name, row
            if time.monotonic() - start > seconds:
                yield name, Row("the rest of this part is left out", f"{seconds / 60:.1f} minutes are over")
                break
        torch.compiler.reset()
        release(setting)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="start nothing new after this (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="run these parts only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here, so nothing was checked")
        return 0
    warnings.simplefilter("ignore")
    setting = Setting(torch.device("cuda", torch.cuda.current_device()))
    print(
        f"{torch.cuda.get_device_name(setting.device)}; CUDA {torch.version.cuda}; {', '.join(map(_version, PACKAGES))}"
    )
    # What is started just before the end may take a minute to compile.
    seconds = 60 * options.minutes - min(60.0, 12 * options.minutes)
    return print_table(rows_of(setting, {name: PARTS[name] for name in options.only or PARTS}, seconds))


def print_table(rows: Iterable[tuple[str, Row]]) -> int:
    """Print rows as they come, and return 1 if one of them is wrong, else 0."""
    print("\n| part | what | found | |\n|---|---|---|---|")
    wrong = 0
    for part, row in rows:
        wrong += row.right is False
        print(f"| {part} | {row.what} | {row.found} | {_VERDICTS[row.right]} |")
        sys.stdout.flush()
    print(f"\n{wrong or 'no'} row{'' if wrong == 1 else 's'} wrong")
    return int(wrong > 0)


_VERDICTS = {True: "ok", False: "WRONG", None: ""}


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    sys.exit(main())
