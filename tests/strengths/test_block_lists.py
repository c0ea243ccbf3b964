"""Lists of block weights mean the same blocks as in other programs, by the original names of the published models."""

import re
from functools import cache

import pytest
import torch

from diffadapt import AdapterError, families
from diffadapt.families.published import published
from diffadapt.runtime.targets import Targets
from diffadapt.strengths.block_lists import block_weights
from diffadapt.strengths.by_prefix import resolve_prefixes
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs
from tests.support.models import draw

DOUBLE, SINGLE = [f"D{index:02}" for index in range(19)], [f"S{index:02}" for index in range(38)]
# The names of the positions in sd-webui-lora-block-weight.
LISTS = {
    ("sd", 17): "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11".split(),
    ("sd", 26): (
        "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 M00 "
        "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    ).split(),
    ("sdxl", 12): "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05".split(),
    ("sdxl", 20): (
        "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08"
    ).split(),
    ("flux", 57): [*DOUBLE, *SINGLE],
    ("flux", 58): ["BASE", *DOUBLE, *SINGLE],
    ("flux", 61): ["CLIP", "T5", "IN", *DOUBLE, *SINGLE, "OUT"],
}


def block_of(original: str) -> str | None:
    """Return the block of a layer, given its original name, by the rule of the programs that the lists come from."""
    match = re.match(r"(input_blocks|output_blocks|double_blocks|single_blocks)\.(\d+)", original)
    if match:
        letters = {"input_blocks": "IN", "output_blocks": "OUT", "double_blocks": "D", "single_blocks": "S"}
        return f"{letters[match[1]]}{int(match[2]):02}"
    if original.startswith("middle_block"):
        return "M00"
    return "IN" if original.split(".")[0].endswith("_in") else "OUT" if original.startswith("final_layer") else None


@cache
def blocks_of(family: str) -> dict[str, str | None]:
    """Return path -> block for every layer of a published pipeline."""
    found: dict[str, str | None] = {}
    for component, model in next(published(family)).items():
        if component.startswith("text_encoder"):
            encoder = ("CLIP" if component == "text_encoder" else "T5") if family == "flux" else "BASE"
            found.update({f"{component}.{path}": encoder for path, _ in model.named_modules() if path})
        else:
            for original, parts in families.aliases(Targets(model)).items():
                found.update({f"{component}.{part.path}": block_of(original) for part in parts})
    return found


@pytest.mark.parametrize(("family", "count"), LISTS)
def test_every_position_weights_its_block(family: str, count: int) -> None:
    names = LISTS[family, count]
    weights = {name: 10.0 + index for index, name in enumerate(names)}
    strengths = block_weights(list(weights.values()))
    blocks = dict(sorted(blocks_of(family).items()))
    values, _ = resolve_prefixes(strengths, list(blocks))
    assert set(names) - {"BASE"} <= set(blocks.values())
    for (path, block), value in zip(blocks.items(), values, strict=True):
        if family == "flux":
            expected = weights.get(block or "", weights.get("BASE", 1.0))
        else:
            # Blocks without a position in the list are off; layers outside of blocks are left alone.
            expected = 1.0 if block is None else weights.get(block, 0.0)
        assert value == expected, (path, block)


def test_a_list_can_be_given_as_text() -> None:
    assert block_weights(" 1, 0.5,-1,0,0,0,0,0,0,0,0 ,.25") == block_weights([1, 0.5, -1, *[0] * 8, 0.25], "sdxl")
    assert block_weights([1.0] * 17, "sd2") == block_weights([1.0] * 17)


@pytest.mark.parametrize(
    ("values", "family", "message"),
    [
        ([1.0] * 13, None, "13 values, expected 12 or 17 or 20 or 26 or 57 or 58 or 61"),
        ([1.0] * 17, "sdxl", "17 values, expected 12 or 20 for sdxl"),
        ([1.0] * 17, "sd3", "family is 'sd3', expected one of sd, sdxl, flux"),
        ("1,R,0", None, "value 2 is 'R', expected a number"),
        ("OUTALL", None, "value 1 is 'OUTALL', expected a number"),
        ([1.0, float("nan")], None, "value 2 is nan"),
    ],
)
def test_invalid_lists_are_refused(values: str | list[float], family: str | None, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        block_weights(values, family)


@pytest.mark.slow
def test_a_list_applies_to_an_adapter_without_layers_in_some_blocks() -> None:
    pipe = models.sd15_full()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet",))), "a")
    full = draw(pipe)
    pipe.adapters.activate({"a": block_weights([0.3] * 8 + [0.6] * 9)})
    weighted = draw(pipe)
    pipe.adapters.activate({"a": {"unet.down_blocks": 0.3, "unet.mid_block": 0.3, "unet.up_blocks": 0.6}})
    assert torch.equal(draw(pipe), weighted)
    assert_differs(weighted, full, 1e-3)
    pipe.adapters.activate({"a": block_weights([0.0] * 26)})
    off = draw(pipe)
    assert torch.equal(off, draw(models.sd15_full()))


def test_a_list_for_another_model_is_refused() -> None:
    pipe = models.flux()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("transformer", "text_encoder"))), "a")
    with pytest.raises(AdapterError, match=r"no layer under 'text_encoder_2', 'unet\.conv_in', .*; it has"):
        pipe.adapters.activate({"a": block_weights([0.0] * 12)})
    pipe.adapters.activate({"a": block_weights([0.0] * 57)})
    with pytest.raises(AdapterError, match=r"no layer under 'transformer\.single_transformer_blocks\.10'"):
        pipe.adapters.activate({"a": dict(block_weights([0.0] * 57))})
