"""What becomes of adapters on the stored weights of every backend: here, and in plain diffusers with peft.

Every cell comes from running a model of one layer. The reference is a float layer in float64, whose weight is read off
the outputs of the stored layer (`Base.computed`); adapters change it by a formula (`tests/support/formulas.py`).
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support.base_bench import BELOW, LAYER, Bench, Wrong, bits, check_gradients, same_random_, warm
from tests.support.base_peer import Diffusers
from tests.support.bases import Base, silenced

STEPS = ("load", "run", "hotswap", "merge", "train")


@dataclass(frozen=True)
class Kind:
    """An adapter type as the table has it.

    Attributes:
        variant: The formula and the file, in `formulas.VARIANTS`.
        config: Settings of a new adapter for training.
        peer: The same in peft; `None` if it has no such type.
    """

    variant: str
    config: Callable[[], diffadapt.AdapterConfig]
    peer: Callable[[], Any] | None = None


def _ours(cls: Any, **options: Any) -> Callable[[], diffadapt.AdapterConfig]:
    return lambda: cls(target_modules=r"below|layer", init=False, **options)


def _peer(cls: Any, **options: Any) -> Callable[[], Any]:
    return lambda: cls(target_modules=[BELOW, LAYER], **options)


KINDS: dict[str, Kind] = {
    "LoRA": Kind("lora", _ours(diffadapt.LoraConfig, rank=4), _peer(peft.LoraConfig, r=4)),
    "DoRA": Kind(
        "dora-peft",
        _ours(diffadapt.LoraConfig, rank=4, use_dora=True),
        _peer(peft.LoraConfig, r=4, use_dora=True),
    ),
    "LoHa": Kind("loha", _ours(diffadapt.LoHaConfig, rank=4), _peer(peft.LoHaConfig, r=4)),
    "LoKr": Kind("lokr-low-rank", _ours(diffadapt.LoKrConfig, rank=2), _peer(peft.LoKrConfig, r=2)),
    "OFT": Kind("oft", _ours(diffadapt.OFTConfig, block_size=8, side="output")),
    "OFT on inputs": Kind(
        "oft-peft",
        _ours(diffadapt.OFTConfig, block_size=8),
        _peer(peft.OFTConfig, r=0, oft_block_size=8),
    ),
    "BOFT": Kind(
        "boft",
        _ours(diffadapt.BOFTConfig, block_size=8, side="output"),
        _peer(peft.BOFTConfig, boft_block_size=8),
    ),
    "IA3": Kind("ia3", _ours(diffadapt.IA3Config), _peer(peft.IA3Config, feedforward_modules=[])),
    "GLoRA": Kind("glora", _ours(diffadapt.GLoRAConfig, rank=4)),
    "full": Kind("full", _ours(diffadapt.FullConfig)),
    "bias": Kind("full-bias-alone", _ours(diffadapt.FullConfig, bias=True)),
}


@dataclass
class Outcome:
    """One row: what an adapter of one type does on one base.

    Attributes:
        base: The name of the base.
        kind: The name of the type, in `KINDS`.
        ours: Step -> "yes", "wrong: how", "refused: why", "warns: why" or "-" (nothing to do).
        diffusers: The same in plain diffusers with peft.
    """

    base: str
    kind: str
    ours: dict[str, str] = field(default_factory=dict[str, str])
    diffusers: dict[str, str] = field(default_factory=dict[str, str])


def judge(base: Base, kind: str, *, peer: bool = True) -> Outcome:
    """Return what becomes of an adapter type on a base. Skips if the backend is not installed."""
    outcome = Outcome(base.name, kind)
    bench = Bench(base, KINDS[kind].variant)
    if bench.content(0) is None:
        outcome.ours = outcome.diffusers = dict.fromkeys(STEPS, "-")
        return outcome
    outcome.ours = _all_steps(_Ours(bench, KINDS[kind].config), AdapterError)
    if peer:
        outcome.diffusers = _all_steps(Diffusers(bench, KINDS[kind].peer), Exception)
    return outcome


def _all_steps(side: Any, refusal: type[Exception]) -> dict[str, str]:
    cells: dict[str, str] = {}
    for step in STEPS:
        if step in ("run", "hotswap", "merge") and cells["load"] != "yes":
            cells[step] = ""
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                getattr(side, step)()
                cells[step] = "yes"
            except Wrong as error:
                cells[step] = f"wrong: {error}"
            except refusal as error:
                cells[step] = f"refused: {reason(error)}"
            except Exception as error:  # a raw crash of ours is as bad as a wrong value
                cells[step] = f"wrong: {type(error).__name__}: {reason(error)}"
        said = [str(warning.message) for warning in caught if _is_ours(warning.filename)]
        if cells[step].startswith("wrong") and said:
            cells[step] = f"warns: {_without_path(said[0])}"
    return cells


def _is_ours(file: str) -> bool:
    """Return whether a warning is ours: it names a file of the library, or this one, which calls it."""
    return file == __file__ or file.startswith(str(Path(diffadapt.__file__).parent))


def reason(error: BaseException) -> str:
    """Return the line of a message that says why, without the path of the layer and the sizes of this one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    why = lines[1] if "cannot be used" in lines[0] and len(lines) > 1 else lines[0]
    return _without_path(why)


def _without_path(text: str) -> str:
    return re.sub(r"^(layer\.\S+.*?: )?(model\.)?layer: ", "", text)


class _Ours:
    """The steps with this library."""

    def __init__(self, bench: Bench, config: Callable[[], diffadapt.AdapterConfig]) -> None:
        self.bench, self.config = bench, config

    def _loaded(self, seed: int = 0) -> tuple[nn.Module, Any]:
        model = _model(warm(self.bench.base))
        with silenced():
            report = diffadapt.load_adapter(model, self.bench.file(seed), "a")
        if report.unused or report.used != len(self.bench.file(seed)):
            raise Wrong(f"{len(report.unused)} tensors are not used")
        return model, diffadapt.adapters(model)

    def _output(self, model: nn.Module) -> Tensor:
        with torch.no_grad(), silenced():
            return model(self.bench.input)

    def load(self) -> None:
        self._loaded()

    def run(self) -> None:
        model, adapters = self._loaded()
        self.bench.check(self._output(model), 0)
        adapters.clear()
        if not torch.equal(self._output(model).double(), self.bench.plain):
            raise Wrong("removing it leaves a trace")

    def hotswap(self) -> None:
        model = _model(warm(self.bench.base))
        adapters = diffadapt.adapters(model)
        first, second = map(self.bench.file, (0, 1))
        adapters.prepare_hotswap([first, second], slots=1)
        adapters.load(first, "a")
        self.bench.check(self._output(model), 0)
        adapters.hotswap("a", second, scale=0.5)
        self.bench.check(self._output(model), 1, 0.5)

    def merge(self) -> None:
        model, adapters = self._loaded()
        running = self._output(model)
        before = bits(model)
        adapters.merge("a")
        self.bench.check_merged(self._output(model), 0)
        adapters.unmerge()
        if not all(map(torch.equal, bits(model), before)) or not torch.equal(self._output(model), running):
            raise Wrong("unmerging does not restore every bit")

    def train(self) -> None:
        layers = self.bench.base.layer(), self.bench.float_layer()
        models = [_model(layer, self.bench.below()).train() for layer in layers]
        added = [diffadapt.add_adapter(model, self.config(), "a") for model in models]
        same_random_(*added)
        check_gradients(self.bench, models, added)


def _model(layer: nn.Module, below: nn.Module | None = None) -> nn.Sequential:
    layers = {LAYER: layer} if below is None else {BELOW: below, LAYER: layer}
    return nn.Sequential(OrderedDict(layers)).requires_grad_(False).eval()
