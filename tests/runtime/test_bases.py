"""Adapters on quantised layers of every backend act as on a float layer with the decoded weight."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import diffadapt
from tests.support import formulas
from tests.support.base_bench import same_random_
from tests.support.bases import BASES, CONVOLUTIONS, EMBEDDINGS, Base, float_layer, silenced
from tests.support.cases import for_each
from tests.support.compare import relative_error
from tests.support.variants import VARIANTS, Variant

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = ("lora-alpha", "dora", "loha-alpha", "lokr-low-rank", "oft", "ia3-lycoris", "full", "glora")
COMPILED = ("bitsandbytes nf4", "torchao int8", "quanto int8", "gguf Q8_0", "hqq 8 bit", "packed")

each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)


class Changes:
    """A model of one quantised layer, and what adapters have to change in its output.

    Attributes:
        base: the output without adapters.
    """

    def __init__(self, base: Base) -> None:
        self.kind, self.input = base, base.input()
        self.model = nn.Sequential(base.layer()).eval()
        self.adapters = diffadapt.adapters(self.model)
        self.output()  # bitsandbytes may round its scales at the first call
        self.base = self.output()
        self.weight, self.bias = base.computed(self.model[0])
        self.layer = base.layer().eval()

    def output(self) -> Tensor:
        with torch.no_grad(), silenced():
            return self.model(self.input).double()

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
        changed = self.kind.output(self.input, content.weight, content.bias)
        return changed - self.kind.output(self.input, self.weight, self.bias)

    def check(self, output: Tensor, change: Tensor) -> None:
        # An adapter may be as far off as the layer itself, and may enlarge its input.
        size = max(1.0, float(output.norm() / self.base.norm()))
        rounding = 3 * self.kind.noise(self.layer, size) * size * self.base.norm()
        assert (output - self.base - change).norm() < 2e-3 * change.norm() + rounding


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
    changes.check(output + changes.base, torch.stack([rows[i] for i, rows in enumerate(expected)]))


@pytest.mark.parametrize("base", [base for base in BASES if base.name in COMPILED], ids=lambda base: base.name)
def test_compiled_slots_take_other_types_without_recompiling(base: Base) -> None:
    changes = Changes(base)
    with silenced():
        changes.adapters.prepare_hotswap([changes.source("lora-alpha"), changes.source("dora")], slots=1)
        changes.load("lora-alpha")
        compiled = torch.compile(changes.model, backend="eager")
    with torch.no_grad(), silenced():
        changes.check(compiled(changes.input).double(), changes.change("lora-alpha"))
        changes.adapters.hotswap("lora-alpha", changes.source("dora"), scale=0.5)
        with torch.compiler.set_stance("fail_on_recompile"):
            changes.check(compiled(changes.input).double(), 0.5 * changes.change("dora"))
    changes.adapters.clear()
    changes.adapters.release_slots()
    assert torch.equal(changes.output(), changes.base)


def test_a_compiled_layer_of_gguf_says_that_its_weight_cannot_be_read() -> None:
    changes = Changes(next(base for base in BASES if base.name == "gguf Q8_0"))
    changes.load("dora")
    with torch.no_grad(), silenced():
        compiled = torch.compile(changes.model, backend="aot_eager")
        with pytest.raises(Exception, match=r"AdapterError: .*GGUFLinear.*reserve slots before compiling"):
            compiled(changes.input)


OFFLOADED = ("bitsandbytes int8", "torchao int8", "hqq 8 bit", "BFL nvfp4", "sdnq int8", "packed")


@pytest.mark.parametrize("base", [base for base in BASES if base.name in OFFLOADED], ids=lambda base: base.name)
@torch.no_grad()
def test_a_layer_that_accelerate_offloads_reads_its_weight(base: Base) -> None:
    changes = Changes(base)
    source, plain = changes.source("dora"), nn.Sequential(base.layer())
    with silenced():
        base_output = plain(changes.input).double()
        diffadapt.load_adapter(plain, source, "a")
        expected = plain(changes.input).double()
    assert relative_error(expected, base_output) > 0.1
    for order in ("offload first", "adapter first"):
        model = nn.Sequential(base.layer())
        steps = [
            partial(cpu_offload, model, execution_device=torch.device("cpu")),
            partial(diffadapt.load_adapter, model, source, "a"),
        ]
        with silenced():
            for step in steps if order == "offload first" else reversed(steps):
                step()
            found = [model(changes.input).double() for _ in range(2)]
        assert max(relative_error(output, expected) for output in found) < 1e-5


# Not GGUF: its parameters do not survive a graph break.
@pytest.mark.parametrize(
    "base", [base for base in BASES if base.name in COMPILED and "gguf" not in base.name], ids=lambda base: base.name
)
def test_a_compiled_layer_reads_its_weight(base: Base) -> None:
    changes = Changes(base)
    changes.load("dora")
    with torch.no_grad(), silenced():
        compiled = torch.compile(changes.model, backend="aot_eager")
        changes.check(compiled(changes.input).double(), changes.change("dora"))


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
        assert relative_error(twin(changes.input).double(), expected) < 1e-6


SOME = [
    *(base for base in BASES if base.name in ("bitsandbytes nf4", "torchao int8", "gguf Q8_0")),
    CONVOLUTIONS[0],
    EMBEDDINGS[0],
]


def _suits(variant: Variant, base: Base) -> bool:
    """Return whether a variant has a meaning on a base. Rotations of inputs have none for ids."""
    adapter_type, options = variant
    if base.kind not in adapter_type.layers or adapter_type.name in ("lora-parameter", "adamss"):
        # The sizes of an AdaMSS depend on clusters of the weight's singular vectors, in which rounding settles ties.
        return False
    if options.get("use_tucker"):
        return base.kind == "conv"
    if base.kind != "embedding":
        return True
    needs_inputs = adapter_type.name in ("boft", "oft", "ia3", "ia3-lycoris", "glora", "glora-peft", "hra")
    on_inputs = options.get("side", "input") == "input" and needs_inputs
    return not (options.get("bias") or on_inputs or options.get("dora_axis") == "input")


NAMED = {f"{adapter_type.name} {options}": (adapter_type, options) for adapter_type, options in VARIANTS}


@pytest.mark.parametrize("base", SOME, ids=lambda base: base.name)
@for_each(name=lambda given: [name for name, variant in NAMED.items() if _suits(variant, given["base"])])
@torch.no_grad()
def test_every_type_is_that_on_a_float_layer_with_the_same_weight(base: Base, name: str) -> None:
    adapter_type, options = NAMED[name]
    if adapter_type.name == "tokens":
        options = {"token_indices": range(0, 160, 2)}
    called = base.layer().eval()
    with silenced():
        called(base.input())  # bitsandbytes rounds its scales at the first call, and trains only before it
    weight, bias = base.computed(called)
    twin = float_layer(base.canonical(weight).float(), None if bias is None else bias.float())
    models = [nn.Sequential(layer).eval().requires_grad_(False) for layer in (base.layer(), twin)]
    make: Any = adapter_type.config
    with silenced():
        added = [diffadapt.add_adapter(model, make(target_modules=["0"], **options), "a") for model in models]
        same_random_(*added)
        # Some types choose elements by the size of the weight, of which several are the same.
        for left, right in zip(*([*a.parameters(), *a.buffers()] for a in added), strict=True):
            right.copy_(left)
        outputs: list[Tensor] = []
        changes: list[Tensor] = []
        for model in models:
            with diffadapt.adapters(model).disabled():
                model(base.input())
                outputs.append(model(base.input()).double())
            changes.append(model(base.input()).double() - outputs[-1])
    found, expected = changes
    size = max(1.0, float((outputs[1] + expected).norm() / outputs[1].norm()))
    assert expected.norm() > 1e-5 * outputs[1].norm()
    rounding = 3 * base.noise(called, size) * size * outputs[1].norm()
    assert (found - expected).norm() < 5e-3 * expected.norm() + rounding
