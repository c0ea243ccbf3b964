"""`parse_prompt`: the adapters that a prompt names, and the prompt without the tags."""

from typing import Any

import pytest
import torch

from diffadapt import AdapterError, Piecewise, parse_prompt
from diffadapt.strengths.block_lists import block_weights
from diffadapt.strengths.by_prefix import SharedStrengths
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs
from tests.support.models import draw


def by_part(te: Any, unet: Any) -> SharedStrengths[Any]:
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    return SharedStrengths({"": unet, **dict.fromkeys(encoders, te)})


def during(*points: tuple[float, float], over: Any = "fraction") -> Piecewise:
    return Piecewise(points, hold=True, over=over)


@pytest.mark.parametrize(
    ("tag", "strength"),
    [
        ("<lora:ink>", 1.0),
        ("<lora:ink:0.8>", 0.8),
        ("<lyco:ink:-.5>", -0.5),
        ("<lora: ink : 0.8 >", 0.8),
        ("<lora:ink:0.5:0.8>", by_part(0.5, 0.8)),
        ("<lora:ink:te=0.5:unet=0.8>", by_part(0.5, 0.8)),
        ("<lora:ink:unet=0.8>", by_part(1.0, 0.8)),
        ("<lora:ink:te=0.5>", 0.5),
        ("<lora:ink:0.5:unet=0.8>", by_part(0.5, 0.8)),
        ("<lora:ink:0.8:0.2-0.7>", by_part(0.8, during((0, 0), (0.2, 0.8), (0.7, 0)))),
        ("<lora:ink:0.8:0.5:0.2-0.7>", by_part(0.8, during((0, 0), (0.2, 0.5), (0.7, 0)))),
        ("<lora:ink:0.8:step=0-0.7>", by_part(0.8, during((0, 0.8), (0.7, 0)))),
        ("<lora:ink:0.8:0.2-1>", by_part(0.8, during((0, 0), (0.2, 0.8)))),
        ("<lora:ink:start=0.2>", by_part(1.0, during((0, 0), (0.2, 1)))),
        ("<lora:ink:end=0.7>", by_part(1.0, during((0, 1), (0.7, 0)))),
        ("<lora:ink:start=5:stop=10>", by_part(1.0, during((0, 0), (5, 1), (10, 0), over="step"))),
        ("<lora:ink:0@0,1@0.5>", Piecewise([(0, 0), (0.5, 1)])),
        ("<lora:ink:1@1;0@0>", Piecewise([(0, 0), (1, 1)])),
        ("<lora:ink:0@5,1@6>", Piecewise([(5, 0), (6, 1)], over="step")),
        ("<lora:ink:te=1:unet=0@0,1@1>", by_part(1.0, Piecewise([(0, 0), (1, 1)]))),
    ],
)
def test_a_tag_states_the_strengths(tag: str, strength: Any) -> None:
    assert parse_prompt(f"a fox {tag}") == ("a fox", {"ink": strength})


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("<lora:a> a fox", "a fox"),
        ("a fox <lora:a> in snow", "a fox in snow"),
        ("a fox, <lora:a>, red", "a fox, red"),
        ("a fox<lora:a>, red", "a fox, red"),
        ("a fox <lora:a>.", "a fox."),
        ("(<lora:a>, fox:1.2)", "(fox:1.2)"),
        ("a <lora:a:1> <lyco:b:1>,<lora:c>, fox", "a, fox"),
        ("<lora:a>", ""),
        ("a  fox , red", "a  fox , red"),
        ("a <hypernet:x:1> and <b> <1>", "a <hypernet:x:1> and <b> <1>"),
        (r"a \<lora:x:0.8> tag", "a <lora:x:0.8> tag"),
        (r"a \<lora:x:0.8> <lora:a> tag", "a <lora:x:0.8> tag"),
    ],
)
def test_tags_are_removed_from_the_prompt(prompt: str, clean: str) -> None:
    text, activation = parse_prompt(prompt)
    assert text == clean
    assert set(activation) == {name for name in "abc" if f":{name}" in prompt}


def test_a_tag_may_have_block_weights() -> None:
    listed = "1,0,0.5,0,0,0,0,0,0,0,0,0.25"
    for tag in (f"<lora:ink:0.8:0.5:lbw={listed}>", f"<lora:ink:0.8:0.5:{listed}>"):
        ((_, strength),) = parse_prompt(tag)[1].items()
        assert strength == {
            **by_part(0.8, 0.5),
            **{
                prefix: weight * (0.8 if prefix.startswith("text_encoder") else 0.5)
                for prefix, weight in block_weights(listed).items()
            },
        }
    _, activation = parse_prompt(f"<lora:ink:0.5:0.2-0.7:lbw={listed}>")
    ink: Any = activation["ink"]
    assert ink["unet.down_blocks.1.attentions.1"] == during((0, 0), (0.2, 0.25), (0.7, 0))
    assert ink["text_encoder"] == 0.5


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<lora::1>", "no name"),
        ("<lora:a:much>", "<lora:a:much>: 'much' is no number"),
        ("<lora:a:nan>", "'nan' is no number"),
        ("<lora:a:1:1:1>", "'1': unet is there twice"),
        ("<lora:a:start=0.1:step=0.2-0.3>", "one range expected"),
        ("<lora:a:0.2-7>", "two fractions of a run or two numbers of steps"),
        ("<lora:a:0.7-0.2>", "range from 0.7 to 0.2"),
        ("<lora:a:0@0,1>", "'1': value@position expected"),
        ("<lora:a:0@0,1@1:0.2-0.7>", "values at positions and a range"),
        ("<lora:a:hr=1>", "'hr=1' is unknown; .* are known"),
        ("<lora:a:lbw=OUTALL>", "value 1 is 'OUTALL'"),
        ("<lora:a> <lora:a:0.5>", "'a' appears twice"),
    ],
)
def test_invalid_tags_are_refused(tag: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parse_prompt(f"a fox {tag}")


def test_several_prompts_are_parsed_separately() -> None:
    prompts, activations = parse_prompt(["a fox <lora:ink:0.8>", "a cat", "<lora:pixel>"])
    assert prompts == ["a fox", "a cat", ""]
    assert activations == [{"ink": 0.8}, {}, {"pixel": 1.0}]


@pytest.mark.slow
def test_a_tagged_prompt_draws_the_same_as_the_strengths_set_by_hand() -> None:
    pipe: Any = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet",), rank=2)), "b")
    base = draw(pipe, prompt="a fox", num_inference_steps=5)
    prompt, activation = parse_prompt("a fox <lora:a:0.4:0.9> <lora:b:0.5:0.25-0.75>")
    pipe.adapters.activate(activation)
    tagged = draw(pipe, prompt=prompt, num_inference_steps=5)
    strengths = [{"a": {"unet": 0.9, "text_encoder": 0.4}, "b": value} for value in (0.0, 0.5, 0.5, 0.0, 0.0)]

    def ended(_: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        pipe.adapters.activate(strengths[min(index + 1, 4)])
        return arguments

    pipe.adapters.activate(strengths[0])
    expected = draw(pipe, prompt="a fox", num_inference_steps=5, callback_on_step_end=ended)
    assert torch.equal(tagged, expected)
    assert_differs(tagged, base, 1e-3)
