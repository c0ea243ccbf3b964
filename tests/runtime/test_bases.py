"""Adapters on quantised layers of every backend act as on a float layer with the decoded weight."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import weights
from tests.support import formulas
from tests.support.bases import BASES, INPUTS, Base, silenced
from tests.support.cases import for_each
from tests.support.compare import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = ("lora-alpha", "dora", "loha-alpha", "lokr-low-rank", "oft", "ia3-lycoris", "full", "glora")
COMPILED = ("bitsandbytes nf4", "torchao int8", "quanto int8", "gguf Q8_0", "hqq 8 bit", "packed")

INPUT = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(2))
each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)


class Changes:
    """A model of one quantised layer, and what adapters have to change in its output.

    Attributes:
        base: the output without adapters.
    """

    def __init__(self, base: Base) -> None:
        self.model = nn.Sequential(base.layer())
        self.weight = weights.decoded(self.model[0], "weight").double()
        self.bias = weights.decoded(self.model[0], "bias").double()
        # Layers that also quantise their input do not compute exactly with their weight.
        self.tolerance = 0.2 if "dynamic" in base.name or "modelopt" in base.name else 2e-3
        self.adapters = diffadapt.adapters(self.model)
        self.base = self.output()

    def output(self) -> Tensor:
        with torch.no_grad(), silenced():
            return self.model(INPUT).double()

    def content(self, name: str) -> formulas.Content:
        torch.manual_seed(len(name))
        content = formulas.VARIANTS[name][1](self.weight, self.bias)
        assert content is not None
        return content

    def source(self, name: str) -> dict[str, Tensor]:
        return {f"0.{key}": tensor.float() for key, tensor in self.content(name).tensors.items()}

    def load(self, name: str, **options: Any) -> None:
        with silenced():
            self.adapters.load(self.source(name), name, **options)

    def change(self, name: str) -> Tensor:
        """Return the change of the output by an adapter of strength 1."""
        content = self.content(name)
        assert content.bias is not None
        return INPUT.double() @ (content.weight - self.weight).T + content.bias - self.bias

    def check(self, output: Tensor, change: Tensor) -> None:
        assert relative_error(output - self.base, change) < self.tolerance


@each_base
def test_every_type_runs_at_every_strength_and_leaves_no_trace(base: Base) -> None:
    changes = Changes(base)

    @for_each(name=TYPES)
    def check(name: str) -> None:
        change = changes.change(name)
        changes.load(name)
        changes.check(changes.output(), change)
        changes.adapters.activate({name: 0.5})
        changes.check(changes.output(), 0.5 * change)
        changes.adapters.remove(name)
        assert torch.equal(changes.output(), changes.base)

    check()


@each_base
def test_several_adapters_and_mixes_per_sample(base: Base) -> None:
    changes = Changes(base)
    for name in ("lora-alpha", "loha-alpha", "dora"):
        changes.load(name, activate=False)
    lora, loha, dora = map(changes.change, ("lora-alpha", "loha-alpha", "dora"))
    changes.adapters.activate({"lora-alpha": 0.5, "loha-alpha": 2.0})
    changes.check(changes.output(), 0.5 * lora + 2 * loha)
    with changes.adapters.per_sample([{"lora-alpha": 1.0}, {"dora": 0.5}, {}, {"loha-alpha": 1.0, "dora": 1.0}]):
        output = changes.output() - changes.base
    expected = (lora, 0.5 * dora, 0 * lora, loha + dora)
    assert relative_error(output, torch.stack([rows[i] for i, rows in enumerate(expected)])) < changes.tolerance


@pytest.mark.parametrize("base", [base for base in BASES if base.name in COMPILED], ids=lambda base: base.name)
def test_compiled_slots_take_other_types_without_recompiling(base: Base) -> None:
    changes = Changes(base)
    with silenced():
        changes.adapters.prepare_hotswap([changes.source("lora-alpha"), changes.source("dora")], slots=1)
        changes.load("lora-alpha")
        compiled = torch.compile(changes.model, backend="eager")
    with torch.no_grad(), silenced():
        changes.check(compiled(INPUT).double(), changes.change("lora-alpha"))
        changes.adapters.hotswap("lora-alpha", changes.source("dora"), scale=0.5)
        with torch.compiler.set_stance("fail_on_recompile"):
            changes.check(compiled(INPUT).double(), 0.5 * changes.change("dora"))
    changes.adapters.clear()
    changes.adapters.release_slots()
    assert torch.equal(changes.output(), changes.base)


# Not GGUF: its parameters do not survive a graph break.
@pytest.mark.parametrize(
    "base", [base for base in BASES if base.name in COMPILED and "gguf" not in base.name], ids=lambda base: base.name
)
def test_a_compiled_layer_reads_its_weight(base: Base) -> None:
    changes = Changes(base)
    changes.load("dora")
    with torch.no_grad(), silenced():
        compiled = torch.compile(changes.model, backend="aot_eager")
        changes.check(compiled(INPUT).double(), changes.change("dora"))


@each_base
def test_a_copy_has_the_adapter(base: Base) -> None:
    changes = Changes(base)
    try:
        deepcopy(changes.model)
    except Exception as error:
        pytest.skip(f"{base.name}: the layer cannot be copied ({type(error).__name__})")
    changes.load("dora")
    twin = deepcopy(changes.model)
    expected = changes.output()
    changes.adapters.clear()
    with torch.no_grad(), silenced():
        assert relative_error(twin(INPUT).double(), expected) < 1e-6
