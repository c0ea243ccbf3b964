"""Learned tokens: prompts mean the same as after diffusers' `load_textual_inversion`, and removal leaves no trace."""

import copy
import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ByT5Tokenizer

import diffadapt
from diffadapt import AdapterError
from diffadapt.tokens import vocabulary
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.versions import at_least, needs

pytestmark = pytest.mark.slow

Encoders = Mapping[str, str]
"""Key in files -> suffix of the components."""

FAMILIES: dict[str, tuple[Callable[[], DiffusionPipeline], Encoders]] = {
    "sd15": (models.sd15, {"clip_l": ""}),
    "sdxl": (models.sdxl, {"clip_l": "", "clip_g": "_2"}),
    "flux": (models.flux, {"clip_l": "", "t5": "_2"}),
}


def vectors(rows: int, seed: int = 0, width: int = models.WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2


def lora(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Return a kohya file for the queries of the denoiser."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    parts = loras.parts_for(pipe, (name,), "to_q", rank=2)
    return spellings.kohya_names(parts, {name: "lora_unet_"})


def bundle(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"bundle_emb.{t}.{key}": tensor for t, keys in tensors.items() for key, tensor in keys.items()}


def encoded(pipe: DiffusionPipeline, prompt: str) -> list[Tensor]:
    """Return everything that `encode_prompt` returns for a prompt."""
    with torch.no_grad():
        if hasattr(pipe, "text_encoder_3"):
            found: Any = pipe.encode_prompt(prompt, None, None, device="cpu")
        elif hasattr(pipe, "transformer"):
            found = pipe.encode_prompt(prompt, None, device="cpu")
        elif hasattr(pipe, "text_encoder_2"):
            found = pipe.encode_prompt(prompt, device="cpu", negative_prompt="a")
        else:
            found = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt="a")
    return [tensor for tensor in found if tensor is not None]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def words(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return everything in the tokenizers that a new token changes."""
    return {
        name: (len(tokenizer), tokenizer.get_vocab(), tokenizer.added_tokens_encoder, tokenizer("a pix <s0>").input_ids)
        for name, tokenizer in pipe.components.items()
        if name.startswith("tokenizer") and tokenizer is not None
    }


class Before:
    """The state of a pipeline that has to be restored, bit for bit."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        # transformers sets attributes on modules in their first call.
        encoded(pipe, "a fox")
        self.models, self.words = snapshot(pipe), words(pipe)
        self.configs = {name: c.config.to_dict() for name, c in pipe.components.items() if name.startswith("text_enc")}

    def assert_there(self, pipe: DiffusionPipeline) -> None:
        assert_unchanged(pipe, self.models)
        assert words(pipe) == self.words
        assert {name: getattr(pipe, name).config.to_dict() for name in self.configs} == self.configs


def assert_as_diffusers(
    pipe: DiffusionPipeline,
    oracle: DiffusionPipeline,
    tokens: Mapping[str, Mapping[str, Tensor]],
    encoders: Encoders,
    prompt: str,
) -> None:
    base = encoded(oracle, prompt)
    for token, keys in tokens.items():
        for key, tensor in keys.items():
            suffix = encoders[key]
            oracle.load_textual_inversion(
                {token: tensor},
                tokenizer=getattr(oracle, f"tokenizer{suffix}"),
                text_encoder=getattr(oracle, f"text_encoder{suffix}"),
            )
    actual = encoded(pipe, prompt)
    assert_equal(actual, encoded(oracle, prompt))
    assert_differs(actual[0], base[0])


# Prompts


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_as_after_load_textual_inversion(family: str, rows: int) -> None:
    build, encoders = FAMILIES[family]
    pipe = build()
    before = Before(pipe)
    tokens = {"pix": {key: vectors(rows + index, index) for index, key in enumerate(encoders)}}
    report = pipe.load_adapter({**lora(pipe), **bundle(tokens)}, "a")
    assert report.unused == []
    assert report.tokens == {"pix": rows + len(encoders) - 1}
    assert "pix" in str(report)
    assert pipe.adapters["a"].tokens == report.tokens
    pipe.adapters.activate([])
    assert_as_diffusers(pipe, build(), tokens, encoders, "a pix fox")
    pipe.adapters.clear()
    before.assert_there(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_without_the_token_are_encoded_as_before(family: str) -> None:
    build, encoders = FAMILIES[family]
    pipe = build()
    base = encoded(pipe, "a fox")
    pipe.load_adapter(bundle({"pix": dict.fromkeys(encoders, vectors(2))}), "a")
    assert_equal(encoded(pipe, "a fox"), base)


def test_a_modular_pipeline_draws_the_same_as_after_load_textual_inversion() -> None:
    pipe, plain = models.sdxl_modular(), models.sdxl_modular()
    tokens = {"pix": {"clip_l": vectors(2), "clip_g": vectors(2, 1)}}
    pipe.load_adapter(bundle(tokens), "a")
    picture, base = (models.draw(p, prompt="a pix fox") for p in (pipe, plain))
    assert_differs(picture, base, 1e-4)
    for suffix, key in (("", "clip_l"), ("_2", "clip_g")):
        plain.load_textual_inversion(
            {"pix": tokens["pix"][key]},
            tokenizer=getattr(plain, f"tokenizer{suffix}"),
            text_encoder=getattr(plain, f"text_encoder{suffix}"),
        )
    assert torch.equal(models.draw(plain, prompt="a pix fox"), picture)


def test_a_pipeline_that_does_not_expand_tokens_gets_all_vectors() -> None:
    """Stable Diffusion 3 has no `maybe_convert_prompt`."""
    pipe, oracle = models.sd3(), models.sd3()
    before = Before(pipe)
    tokens = {"clip_l": vectors(2), "clip_g": vectors(3, 1), "t5": vectors(3, 2, 2 * models.WIDTH)}
    pix = ["pix", "pix_1", "pix_2"]
    pipe.load_adapter(bundle({"pix": tokens}), "a")
    for suffix, rows in zip(("", "_2", "_3"), tokens.values(), strict=True):
        tokenizer, encoder = getattr(oracle, f"tokenizer{suffix}"), getattr(oracle, f"text_encoder{suffix}")
        tokenizer.add_tokens(pix[: len(rows)])
        encoder.resize_token_embeddings(len(tokenizer))
        encoder.get_input_embeddings().weight.data[-len(rows) :] = rows
    # T5's tokenizer in older versions has a token for the space between two added tokens.
    last = " ".join(["a", *pix, "fox"]) if at_least("transformers", "5.0") else f"a {''.join(pix)} fox"
    spelled = ("a pix pix_1 fox", "a pix pix_1 pix_2 fox", last)
    with torch.no_grad():
        expected = oracle.encode_prompt(*spelled, device="cpu")
        again = pipe.encode_prompt(*spelled, device="cpu")
    found = [tensor for tensor in expected if tensor is not None]
    assert_equal(encoded(pipe, "a pix fox"), found)
    assert_equal([tensor for tensor in again if tensor is not None], found)
    pipe.adapters.remove("a")
    before.assert_there(pipe)


def test_tokens_of_a_pipeline_without_textual_inversion_have_all_names() -> None:
    pipe = models.sd3()
    before = Before(pipe)
    base = pipe.text_encoder_3.get_input_embeddings().weight[:1].detach()
    report = pipe.load_adapter(bundle({"pix": {"clip_g": vectors(2), "t5": vectors(2, 1, 2 * models.WIDTH)}}), "a")
    assert report.tokens == {"pix": 2}
    ids = pipe.tokenizer_3("pix", add_special_tokens=False, return_tensors="pt").input_ids
    assert_same(pipe.text_encoder_3.encoder.embed_tokens(ids)[0], vectors(2, 1, 2 * models.WIDTH), 0)
    assert torch.equal(pipe.text_encoder_3.get_input_embeddings().weight[:1], base)
    assert "pix" not in pipe.tokenizer.get_vocab()
    assert "pix" in pipe.tokenizer_2.get_vocab()
    pipe.adapters.remove("a")
    before.assert_there(pipe)


def test_new_ids_that_are_spare_rows_of_the_weight_do_not_change_it() -> None:
    """The weight of T5 has more rows than there are tokens."""
    pipe = models.flux()
    tokenizer, embedding = pipe.tokenizer_2, pipe.text_encoder_2.get_input_embeddings()
    assert len(tokenizer) < embedding.num_embeddings
    before = embedding.weight.detach().clone()
    pipe.load_adapter(bundle({"pix": {"t5": vectors(1)}}), "a")
    assert torch.equal(embedding.weight, before)
    assert torch.equal(embedding(torch.tensor([[len(tokenizer) - 1]]))[0], vectors(1))


# Files


def saved(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), folder / name)
    return folder / name


L, G = vectors(2, 5), vectors(2, 6)
PIVOTAL = {"<s0>": {"clip_l": L[0], "clip_g": G[0]}, "<s1>": {"clip_l": L[1], "clip_g": G[1]}}
NAMED = {"my-cat": {"clip_l": L, "clip_g": G}}
FILES: dict[str, tuple[str, dict[str, Tensor], Mapping[str, Mapping[str, Tensor]]]] = {
    "bundle": ("x.safetensors", bundle({"v1.2": {"clip_l": L, "clip_g": G}}), {"v1.2": {"clip_l": L, "clip_g": G}}),
    "bundle, old": ("x.safetensors", bundle({"pix": {"string_to_param.*": L}}), {"pix": {"clip_l": L}}),
    "bundle, plain": ("x.safetensors", bundle({"pix": {"emb_params": L}}), {"pix": {"clip_l": L}}),
    "comfy": ("my-cat.safetensors", {"clip_l": L, "clip_g": G}, NAMED),
    "pivotal": ("lora_emb.safetensors", {"clip_l": L, "clip_g": G}, PIVOTAL),
    "pivotal, old": ("x.safetensors", {"text_encoders_0": L, "text_encoders_1": G}, PIVOTAL),
    "pivotal, pti": ("embeddings.pti", {"text_encoders_0": L, "text_encoders_1": G}, PIVOTAL),
    "a1111": ("my-cat.safetensors", {"emb_params": L}, {"my-cat": {"clip_l": L}}),
    "onetrainer": ("my-cat.safetensors", {"emp_params": L}, {"my-cat": {"clip_l": L}}),
    "a1111, any": ("my-cat.safetensors", {"*": L}, {"my-cat": {"clip_l": L}}),
    "diffusers": ("learned_embeds.safetensors", {"<cat-toy>": L[0]}, {"<cat-toy>": {"clip_l": L[:1]}}),
    "diffusers, bare": ("learned_embeds.safetensors", {"cat-toy": L}, {"cat-toy": {"clip_l": L}}),
    "cloneofsimo": (
        "x.safetensors",
        {"<s1>": L[0], "<s2>": L[1]},
        {"<s1>": {"clip_l": L[0]}, "<s2>": {"clip_l": L[1]}},
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_with_tokens_only_are_loaded(case: str, tmp_path: Path) -> None:
    name, tensors, tokens = FILES[case]
    path = saved(tmp_path, name, tensors)
    pipe = models.sdxl()
    before = Before(pipe)
    report = pipe.load_adapter(path)
    assert report.format == "embeddings"
    assert report.types == {}
    assert report.used == len(tensors)
    assert report.unused == []
    assert list(report.tokens) == list(tokens)
    assert diffadapt.inspect(path).tokens == report.tokens == diffadapt.inspect(path, pipe).tokens
    prompt = f"a {' '.join(tokens)} fox"
    assert_as_diffusers(pipe, models.sdxl(), tokens, {"clip_l": "", "clip_g": "_2"}, prompt)
    pipe.adapters.remove(report.name)
    before.assert_there(pipe)


@pytest.mark.parametrize("spell", [spellings.kohya_names, spellings.peft_names, spellings.old_names])
def test_tokens_are_loaded_together_with_layers_of_any_dialect(spell: Callable[..., dict[str, Tensor]]) -> None:
    pipe = models.sd15()
    report = pipe.load_adapter({**spell(loras.parts_for(pipe, ("unet",))), "<s1>": vectors(1)[0]}, "a")
    assert report.unused == []
    assert report.tokens == {"<s1>": 1}
    assert_as_diffusers(pipe, models.sd15(), {"<s1>": {"clip_l": vectors(1)}}, {"clip_l": ""}, "a <s1> fox")


def test_a_nameless_token_in_a_state_dict_is_named_after_the_adapter() -> None:
    pipe = models.sd15()
    assert pipe.load_adapter({"clip_l": vectors(2)}, "my-cat").tokens == {"my-cat": 2}
    with pytest.raises(AdapterError, match="does not say its token; pass it as name="):
        pipe.load_adapter({"clip_l": vectors(2)})


def test_the_width_of_a_vector_tells_its_text_encoder() -> None:
    pipe = models.sd3()
    pipe.load_adapter({"<a>": vectors(1, width=2 * models.WIDTH)[0]})
    assert "<a>" in pipe.tokenizer_3.get_vocab()
    assert "<a>" not in pipe.tokenizer.get_vocab()


def test_vectors_get_the_dtype_in_which_the_text_encoder_computes() -> None:
    pipe = models.sd15()
    pipe.text_encoder.to(torch.bfloat16)
    report = pipe.load_adapter({"<a>": vectors(1), "<b>": vectors(1, 1)})
    assert pipe.adapters[report.name].dtypes == (torch.bfloat16,)
    pipe.adapters.remove(report.name)
    pipe.load_adapter({"<a>": vectors(1), "<b>": vectors(1, 1).half()}, "mixed")
    embedded = pipe.text_encoder.get_input_embeddings()(torch.tensor([54, 55]))
    assert torch.equal(embedded, torch.cat([vectors(1), vectors(1, 1).half()]).bfloat16())


# Vectors that replace outputs of the text encoder


def with_outputs(pipe: DiffusionPipeline, outputs: Mapping[str, Tensor]) -> None:
    """Follow OneTrainer: the embeddings of tokens are zero, and their outputs are replaced.

    Args:
        outputs: Suffix of the text encoder -> outputs of the token.
    """
    for suffix, rows in outputs.items():
        tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
        names = ["pix", "pix_1"][: len(rows)]
        tokenizer.add_tokens(names)
        encoder.resize_token_embeddings(len(tokenizer))
        encoder.get_input_embeddings().weight.data[-len(rows) :] = 0
        plain = encoder.forward
        numbers = tokenizer.convert_tokens_to_ids(names)

        def forward(ids: Tensor, *args: Any, p: Any = plain, n: Any = numbers, r: Tensor = rows, **kwargs: Any) -> Any:
            found = p(ids, *args, **kwargs)
            for number, row in zip(n, r, strict=True):
                for state in (found["last_hidden_state"], *(found.get("hidden_states") or (None,))[1:]):
                    state[ids == number] = row
            return found

        encoder.forward = forward


OUTPUTS = {"sd15": {"clip_l": ""}, "sdxl": {"clip_l": "", "clip_g": "_2"}, "flux": {"t5": "_2"}}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("family", OUTPUTS)
def test_vectors_can_replace_outputs_of_the_text_encoder(family: str, zeros: bool, tmp_path: Path) -> None:
    build, encoders = FAMILIES[family][0], OUTPUTS[family]
    pipe, oracle = build(), build()
    before, base = Before(pipe), encoded(pipe, "a pix fox")
    tokens = {f"{key}_out": vectors(2, seed) for seed, key in enumerate(encoders)}
    if zeros:
        # OneTrainer saves these zeros, too.
        tokens |= {key: torch.zeros(2, models.WIDTH) for key in encoders}
    file = bundle({"pix": tokens})
    report = pipe.load_adapter(file, "a")
    assert (report.unused, report.used, report.tokens) == ([], len(file), {"pix": 2})
    with_outputs(oracle, {suffix: tokens[f"{key}_out"] for key, suffix in encoders.items()})
    found = encoded(pipe, "a pix fox")
    assert_equal(found, encoded(oracle, "a pix fox"))
    assert_differs(found[0], base[0])
    assert_equal(encoded(pipe, "a fox"), encoded(build(), "a fox"))
    pipe.adapters.save("a", tmp_path / "a.safetensors", format="onetrainer")
    saved = load_file(tmp_path / "a.safetensors")
    assert saved.keys() == file.keys()
    assert all(torch.equal(saved[key], file[key]) for key in file)
    pipe.adapters.remove("a")
    before.assert_there(pipe)
    (key, suffix), *_ = encoders.items()
    save_file({"emp_params_out": tokens[f"{key}_out"]}, tmp_path / "pix.safetensors")
    if len(encoders) == 1 and not suffix:
        assert pipe.load_adapter(tmp_path / "pix.safetensors").tokens == {"pix": 2}
        assert_equal(encoded(pipe, "a pix fox"), found)


def test_different_numbers_of_vectors_and_outputs_are_refused() -> None:
    pipe = models.sd15()
    before = Before(pipe)
    with pytest.raises(AdapterError, match="1 vectors, and 2 for what the text encoder gives"):
        pipe.load_adapter(bundle({"pix": {"clip_l": vectors(1), "clip_l_out": vectors(2)}}))
    before.assert_there(pipe)


def test_the_same_token_with_other_outputs_is_refused() -> None:
    pipe = models.sd15()
    pipe.load_adapter(bundle({"pix": {"clip_l_out": vectors(1)}}), "a")
    pipe.load_adapter(bundle({"pix": {"clip_l_out": vectors(1)}}), "b")
    for other in ({"clip_l_out": vectors(1, 1)}, {"clip_l": torch.zeros(1, models.WIDTH)}):
        with pytest.raises(AdapterError, match="knows it from adapter 'a', with other vectors"):
            pipe.load_adapter(bundle({"pix": other}), "c")


# Faults: nothing is installed if there is one


FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "width": (bundle({"pix": {"clip_l": vectors(1, width=7)}}), "width 7 do not fit text_encoder, which has 32"),
    "any width": ({"<pix>": vectors(1, width=7)}, "width 7 fit no text encoder; there are text_encoder (clip"),
    "encoder": (bundle({"pix": {"t5": vectors(1)}}), "no text encoder 't5'; there are text_encoder (clip_text_model"),
    "shape": (bundle({"pix": {"clip_l": vectors(1).view(1, 1, -1)}}), "shape (1, 1, 32)"),
    "empty": (bundle({"pix": {"clip_l": vectors(0)}}), "shape (0, 32)"),
    "integers": (bundle({"pix": {"clip_l": vectors(1).long()}}), "dtype torch.int64"),
    "not finite": (bundle({"pix": {"clip_l": vectors(1) / 0}}), "NaN or infinite"),
    "too many": (bundle({"pix": {"clip_l": vectors(17)}}), "17 vectors do not fit into the 16 tokens of a prompt"),
    "outputs": (bundle({"pix": {"clip_l_out": vectors(1), "clip_g_out": vectors(1)}}), "under another key already"),
    "twice": (bundle({"pix": {"clip_l": vectors(1), "string_to_param.*": vectors(1)}}), "under another key already"),
    "both clip": (bundle({"pix": {"clip_l": vectors(1), "clip_g": vectors(1)}}), "under another key already"),
    "known": (bundle({"q": {"clip_l": vectors(1)}}), "the tokenizer of text_encoder has 'q' already"),
    "numbered": ({"<a>": vectors(1), "<b>": vectors(1), **bundle({"<a>_1": {"clip_l": vectors(1)}})}, "number only"),
    "layer": (
        {**bundle({"pix": {"clip_l": vectors(1)}}), "lora_unet_x.lora_up.weight": vectors(1)},
        "unet has no layer",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_changes_nothing(case: str) -> None:
    tensors, message = FAULTS[case]
    pipe = models.sd15()
    before = Before(pipe)
    with pytest.raises(AdapterError, match=re.escape(message)):
        pipe.load_adapter({**lora(pipe), **tensors}, "a")
    before.assert_there(pipe)
    if case != "layer":
        report = pipe.load_adapter({**lora(pipe), **tensors}, "a", strict=False)
        assert len(report.unused) == 1
        pipe.adapters.clear()
        before.assert_there(pipe)


def test_a_failure_during_installation_removes_what_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = models.sdxl()
    before = Before(pipe)
    tensors = {**lora(pipe), **bundle({"pix": {"clip_l": vectors(2), "clip_g": vectors(2)}})}
    monkeypatch.setattr(pipe.tokenizer_2, "add_tokens", lambda names: 0, raising=False)
    with pytest.raises(AdapterError, match="tokenizer of text_encoder_2 does not take 'pix', 'pix_1'"):
        pipe.load_adapter(tensors, "a")
    monkeypatch.undo()
    before.assert_there(pipe)
    with pytest.raises(AdapterError, match="no layer under 'nowhere'"):
        pipe.load_adapter(tensors, "a", scale={"nowhere": 1.0})
    before.assert_there(pipe)


def test_adapters_share_a_token_if_its_vectors_are_the_same() -> None:
    """The token stays until the last of these adapters is removed."""
    pipe = models.sd15()
    before = Before(pipe)
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    with pytest.raises(AdapterError, match="from adapter 'a', with other vectors; remove that one first"):
        pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2, 1)}}), "b")
    with pytest.raises(AdapterError, match="from adapter 'a', with other vectors"):
        pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)[:1]}}), "b")
    with pytest.raises(AdapterError, match="has 'pix_1' already"):
        pipe.load_adapter(bundle({"pix_1": {"clip_l": vectors(1)}}), "b")
    with pytest.raises(AdapterError, match="number only"):
        pipe.load_adapter(bundle({"pix_2": {"clip_l": vectors(1)}}), "b")
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}, "fix": {"clip_l": vectors(1, 3)}}), "b")
    both = encoded(pipe, "a pix fix")
    pipe.adapters.remove("a")
    assert_equal(encoded(pipe, "a pix fix"), both)
    pipe.adapters.remove("b")
    before.assert_there(pipe)


# Removal


@pytest.mark.parametrize("build", [models.sd15, models.flux])
@pytest.mark.parametrize("removed", ["a", "b", "c"])
def test_the_removal_of_an_adapter_leaves_the_tokens_of_others(
    removed: str, build: Callable[[], DiffusionPipeline]
) -> None:
    pipe = build()
    before = Before(pipe)
    for seed, name in enumerate("abc"):
        key = {"clip_l": vectors(2, seed), **({"t5": vectors(1, seed)} if hasattr(pipe, "tokenizer_2") else {})}
        pipe.load_adapter(bundle({f"<{name}>": key}), name)
    left = [name for name in "abc" if name != removed]
    prompt = " ".join(f"<{name}>" for name in left)
    expected = encoded(pipe, prompt)
    pipe.adapters.remove(removed)
    assert_equal(encoded(pipe, prompt), expected)
    assert f"<{removed}>" not in pipe.tokenizer.get_vocab()
    assert len(pipe.tokenizer) == 54 + 4
    assert sorted(pipe.tokenizer.get_vocab().values()) == list(range(54 + 4))
    pipe.load_adapter(bundle({f"<{removed}>": {"clip_l": vectors(1, 9)}}), "again")
    assert_equal(encoded(pipe, prompt), expected)
    pipe.adapters.clear()
    before.assert_there(pipe)


def test_tokens_that_diffusers_loaded_before_are_kept() -> None:
    pipe = models.sd15()
    pipe.load_textual_inversion({"theirs": vectors(2, 7)})
    before, expected = Before(pipe), encoded(pipe, "a theirs fox")
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    both = models.sd15()
    both.load_textual_inversion({"theirs": vectors(2, 7)})
    assert_as_diffusers(pipe, both, {"pix": {"clip_l": vectors(2)}}, {"clip_l": ""}, "a theirs pix fox")
    pipe.adapters.remove("a")
    before.assert_there(pipe)
    assert_equal(encoded(pipe, "a theirs fox"), expected)


def test_diffusers_can_load_and_unload_tokens_while_an_adapter_has_some() -> None:
    # Without any adapter, diffusers gives the id of an earlier word to a later one when it unloads one after both.
    needs("transformers", "5.0", "unloading a word after two others")
    pipe = models.sd15()
    pipe.load_textual_inversion({"first": vectors(1, 7)})
    pipe.load_adapter({**lora(pipe), **bundle({"pix": {"clip_l": vectors(2)}})}, "a")
    expected = encoded(pipe, "a pix fox")
    pipe.load_textual_inversion({"second": vectors(2, 8)})
    assert_equal(encoded(pipe, "a pix fox"), expected)
    with pytest.raises(AdapterError, match="has got 'second', 'second_1' after this adapter's tokens"):
        pipe.adapters.remove("a")
    assert_equal(encoded(pipe, "a pix fox"), expected)
    pipe.unload_textual_inversion(["second", "second_1"])
    pipe.unload_textual_inversion("first")
    assert_equal(encoded(pipe, "a pix fox"), expected)
    pipe.adapters.remove("a")
    assert "pix" not in pipe.tokenizer.get_vocab()
    assert encoded(pipe, "a pix fox")[0].isfinite().all()


# Together with everything else that changes a text encoder


def embedding_adapter(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    path = "text_encoder.text_model.embeddings.token_embedding"
    return {
        f"{path}.lora_A.weight": torch.randn(2, 54, generator=generator),
        f"{path}.lora_B.weight": torch.randn(models.WIDTH, 2, generator=generator),
    }


@pytest.mark.parametrize("tokens_first", [True, False])
def test_an_adapter_on_the_token_embedding_leaves_learned_tokens_alone(tokens_first: bool) -> None:
    """Both may be loaded and removed in any order."""
    pipe = models.sd15()
    before = Before(pipe)
    steps = [
        lambda: pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "tokens"),
        lambda: pipe.load_adapter(embedding_adapter(pipe), "lora"),
    ]
    for step in steps if tokens_first else reversed(steps):
        step()
    layer = pipe.text_encoder.get_input_embeddings()
    ids = torch.tensor([[1, 54, 2, 55]])
    only = models.sd15()
    only.load_adapter(embedding_adapter(only), "lora")
    changed = only.text_encoder.get_input_embeddings()(torch.tensor([[1, 2]]))
    assert_differs(changed, layer.weight[[1, 2]].detach())
    assert torch.equal(layer(ids)[:, [1, 3]], vectors(2).unsqueeze(0))
    assert_same(layer(ids)[:, [0, 2]], changed, 1e-6)
    plain = encoded(pipe, "a pix fox")
    pipe.adapters.merge("lora")
    assert_same(encoded(pipe, "a pix fox")[0], plain[0])
    pipe.adapters.unmerge()
    pipe.adapters.remove("lora" if tokens_first else "tokens")
    pipe.adapters.remove("tokens" if tokens_first else "lora")
    before.assert_there(pipe)


def cast(pipe: DiffusionPipeline) -> None:
    apply_layerwise_casting(pipe.text_encoder, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())


HOOKS: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "layerwise casting": cast,
    "sequential cpu offload": lambda pipe: accelerate.cpu_offload(
        pipe.text_encoder, execution_device=torch.device("cpu")
    ),
    "model cpu offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group offload": lambda pipe: apply_group_offloading(
        pipe.text_encoder, onload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_tokens_work_under_casting_and_offloading(hook: str, hook_first: bool) -> None:
    pipe, plain = models.sd15(), models.sd15()
    if hook == "layerwise casting":
        HOOKS[hook](plain)
    base = encoded(plain, "a fox")
    if hook_first:
        HOOKS[hook](pipe)
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    if not hook_first:
        HOOKS[hook](pipe)
    plain.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    expected = encoded(plain, "a pix fox")
    assert_differs(expected[0].float(), base[0].float())
    for _ in range(2):
        assert_equal(encoded(pipe, "a pix fox"), expected)
    pipe.adapters.remove("a")
    assert_equal(encoded(pipe, "a fox"), base)


def test_the_state_dict_and_the_config_stay_those_of_the_base_model() -> None:
    pipe, plain = models.sd15(), models.sd15()
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    assert pipe.text_encoder.state_dict().keys() == plain.text_encoder.state_dict().keys()
    assert pipe.text_encoder.config.vocab_size == plain.text_encoder.config.vocab_size
    expected = encoded(pipe, "a pix fox")
    pipe.text_encoder.load_state_dict(plain.text_encoder.state_dict(), strict=True)
    assert_equal(encoded(pipe, "a pix fox"), expected)


def test_a_copy_of_a_pipeline_has_its_own_tokens() -> None:
    pipe = models.sd15()
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    expected = encoded(pipe, "a pix fox")
    twin = copy.deepcopy(pipe)
    assert_equal(encoded(twin, "a pix fox"), expected)
    twin.adapters.remove("a")
    assert "pix" not in twin.tokenizer.get_vocab()
    assert_equal(encoded(pipe, "a pix fox"), expected)


def test_a_pickled_text_encoder_keeps_its_tokens() -> None:
    pipe = models.sd15()
    pipe.load_adapter(embedding_adapter(pipe), "lora")
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    expected = encoded(pipe, "a pix fox")
    file = io.BytesIO()
    torch.save(pipe.text_encoder, file)
    file.seek(0)
    pipe.text_encoder = torch.load(file, weights_only=False)
    assert_equal(encoded(pipe, "a pix fox"), expected)
    pipe.adapters.clear()
    plain = models.sd15()
    assert_equal(encoded(pipe, "a fox"), encoded(plain, "a fox"))
    assert type(pipe.text_encoder.get_input_embeddings()) is torch.nn.Embedding


def test_two_pipelines_with_the_same_models_share_tokens() -> None:
    pipe = models.sd15()
    before = Before(pipe)
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(2)}}), "a")
    assert_equal(encoded(other, "a pix fox"), encoded(pipe, "a pix fox"))
    other.adapters.remove("a")
    pipe.adapters.clear()
    before.assert_there(pipe)


def test_two_text_encoders_can_share_a_tokenizer() -> None:
    pipe = models.sdxl()
    pipe.tokenizer_2 = pipe.tokenizer
    tokens = {"pix": {"clip_l": vectors(2), "clip_g": vectors(2, 1)}}
    pipe.load_adapter(bundle({"<a>": {"clip_l": vectors(1, 3), "clip_g": vectors(1, 3)}}), "first")
    pipe.load_adapter(bundle(tokens), "a")
    assert len(pipe.tokenizer) == 54 + 3
    pipe.adapters.remove("first")
    oracle = models.sdxl()
    assert_as_diffusers(pipe, oracle, tokens, {"clip_l": "", "clip_g": "_2"}, "a pix fox")
    pipe.adapters.clear()
    assert len(pipe.tokenizer) == 54


def test_a_compiled_text_encoder_follows_new_ids() -> None:
    pipe = models.sd15()
    for seed, name in enumerate("ab"):
        pipe.load_adapter(bundle({f"<{name}>": {"clip_l": vectors(1, seed)}}), name)
    compiled = torch.compile(pipe.text_encoder, backend="aot_eager", fullgraph=True)

    def embedded() -> Tensor:
        with torch.no_grad():
            return compiled(pipe.tokenizer("a <b> fox", return_tensors="pt").input_ids)[0]

    expected = embedded()
    assert_same(expected, encoded(pipe, "a <b> fox")[0][:, : expected.shape[1]])
    pipe.adapters.remove("a")
    assert_same(embedded(), expected, 1e-6)


# Single models


def test_tokens_are_not_used_if_their_text_encoder_was_not_asked_for() -> None:
    pipe = models.sd15()
    tensors = {**lora(pipe), **bundle({"pix": {"clip_l": vectors(1)}})}
    report = diffadapt.load_adapter(pipe.unet, tensors, "a")
    assert report.unused == [("bundle_emb.pix.clip_l", "no text encoder was asked for")]
    report = pipe.load_adapter(tensors, "b", components=["unet"])
    assert report.unused == [("bundle_emb.pix.clip_l", "no text encoder was asked for")]
    pipe = models.sdxl()
    report = pipe.load_adapter(bundle({"pix": {"clip_l": vectors(1), "clip_g": vectors(1)}}), components="text_encoder")
    assert report.unused == [("bundle_emb.pix.clip_g", "component text_encoder_2 was not asked for")]


def test_a_text_encoder_without_a_tokenizer_is_refused() -> None:
    pipe = models.sd15()
    with pytest.raises(
        AdapterError, match="text_encoder has no tokenizer to know the token; load it with the pipeline"
    ):
        diffadapt.load_adapter(pipe.text_encoder, {"<a>": vectors(1)})


def test_the_table_and_the_adapters_of_one_model_show_tokens() -> None:
    pipe = models.sd15()
    pipe.load_adapter({**lora(pipe), "<a>": vectors(1)}, "a")
    assert "lora,tokens" in str(pipe.adapters)
    before = words(models.sd15())
    diffadapt.adapters(pipe.text_encoder).remove("a")
    assert words(pipe) == before
    assert pipe.adapters["a"].tokens == {}


def test_other_operations_on_adapters_leave_tokens_alone() -> None:
    pipe = models.sd15()
    pipe.load_adapter({**lora(pipe), "<a>": vectors(1)}, "a")
    pipe.load_adapter({"<b>": vectors(1, 1)}, "b", scale=0.5)
    expected = encoded(pipe, "<a> <b>")
    pipe.adapters.to_lora("a", "plain", rank=1)
    pipe.adapters.combine({"a": 0.5, "plain": 0.5}, "both", rank=1)
    pipe.adapters.merge()
    with pipe.adapters.disabled():
        assert_equal(encoded(pipe, "<a> <b>"), expected)
    pipe.adapters.unmerge()
    pipe.adapters.activate({"b": 2.0})
    assert_equal(encoded(pipe, "<a> <b>"), expected)
    with pytest.raises(AdapterError, match="no layer"):
        pipe.adapters.to_lora("b", "nothing")


# Saving


@pytest.mark.parametrize("format", ["kohya", "onetrainer", "comfy"])
def test_saved_tokens_are_loaded_again(format: str, tmp_path: Path) -> None:
    pipe = models.sdxl()
    tensors = {**lora(pipe), **bundle({"pix": {"clip_l": vectors(2), "clip_g": vectors(3)}}), "<s1>": vectors(1)[0]}
    pipe.load_adapter(tensors, "a")
    path = pipe.adapters.save("a", tmp_path / "a.safetensors", format=format)
    written = load_file(path)
    assert torch.equal(written["bundle_emb.pix.clip_l"], vectors(2))
    assert torch.equal(written["bundle_emb.pix.clip_g"], vectors(3))
    assert torch.equal(written["bundle_emb.<s1>.string_to_param.*"], vectors(1))
    again = models.sdxl()
    assert again.load_adapter(path).tokens == {"pix": 3, "<s1>": 1}
    assert_equal(encoded(again, "a pix <s1>"), encoded(pipe, "a pix <s1>"))


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_formats_that_cannot_express_tokens_refuse_them(format: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    pipe.load_adapter({**lora(pipe), "<a>": vectors(1)}, "a")
    with pytest.raises(AdapterError, match=r"no place for the learned tokens \(<a>\); use 'kohya'"):
        pipe.adapters.save("a", tmp_path / "a", format=format)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_with_tokens_only_is_saved(tmp_path: Path) -> None:
    pipe = models.sd15()
    pipe.load_adapter({"<a>": vectors(1)}, "a")
    path = pipe.adapters.save("a", tmp_path / "a.safetensors", format="kohya")
    assert models.sd15().load_adapter(path).tokens == {"<a>": 1}


def test_converted_tokens_keep_every_bit(tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    layer = {
        f"{stem}.lora_up.weight": torch.ones(640, 2).half(),
        f"{stem}.lora_down.weight": torch.ones(2, 2048).half(),
    }
    clip_l, clip_g = vectors(2, width=768).half(), vectors(3, width=1280).half()
    tensors = {**layer, **bundle({"pix": {"clip_l": clip_l, "clip_g": clip_g}})}
    found = load_file(diffadapt.convert(tensors, tmp_path / "a.safetensors", format="onetrainer"))
    assert found["bundle_emb.pix.clip_l"].dtype == torch.float16
    assert torch.equal(found["bundle_emb.pix.clip_l"], clip_l)
    assert torch.equal(found["bundle_emb.pix.clip_g"], clip_g)


# Tokenizers

TOKENIZERS = [models.clip_tokenizer, models.t5_tokenizer, ByT5Tokenizer]


@pytest.mark.parametrize("build", TOKENIZERS)
def test_added_tokens_are_removed_from_fast_and_slow_tokenizers(build: Callable[[], Any]) -> None:
    tokenizer, plain = build(), build()
    vocabulary.add_(tokenizer, ["<a>", "<b>", "<c>"])
    size = len(plain)
    vocabulary.remove_(tokenizer, {"<b>"})
    assert {k: v for k, v in vocabulary.added(tokenizer).items() if v >= size} == {"<a>": size, "<c>": size + 1}
    ids = tokenizer("a <a><c>", add_special_tokens=False).input_ids
    assert ids[-2:] == [size, size + 1]
    assert tokenizer("<b>").input_ids == plain("<b>").input_ids
    vocabulary.add_(tokenizer, ["<d>"])
    assert tokenizer.convert_tokens_to_ids("<d>") == size + 2
    vocabulary.remove_(tokenizer, {"<a>", "<c>", "<d>"})
    assert len(tokenizer) == size
    assert tokenizer.get_vocab() == plain.get_vocab()
    assert tokenizer("a <a> b <c>").input_ids == plain("a <a> b <c>").input_ids


@pytest.mark.parametrize("build", TOKENIZERS)
def test_tokenizers_expand_tokens_of_several_vectors(build: Callable[[], Any], tmp_path: Path) -> None:
    tokenizer, plain, tokenizer_class = build(), build(), type(build())
    for each in (tokenizer, plain):
        vocabulary.add_(each, ["<p>", "<p>_1", "<p>_2", "<q>"])
    vocabulary.spell_out_(tokenizer, {"<p>": ("<p>_1", "<p>_2")})
    wanted = plain("a <p><p>_1<p>_2 b <q>").input_ids
    for text in ("a <p> b <q>", "a <p><p>_1<p>_2 b <q>"):
        assert tokenizer(text).input_ids == wanted
        assert tokenizer([text, "b"]).input_ids == [wanted, plain("b").input_ids]
        assert tokenizer.encode(text) == wanted
        assert tokenizer.tokenize(text) == plain.tokenize("a <p><p>_1<p>_2 b <q>")
    spaced = "<p> <p>_1 <p>_2"
    assert tokenizer(spaced).input_ids == plain(spaced).input_ids
    assert tokenizer("<p>", "<p>").input_ids == plain("<p><p>_1<p>_2", "<p><p>_1<p>_2").input_ids
    cut: dict[str, Any] = {"padding": "max_length", "max_length": 6, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(tokenizer("<p> b c", **cut).input_ids, plain("<p><p>_1<p>_2 b c", **cut).input_ids)
    assert tokenizer("a <p> b <q>").input_ids == wanted
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin("a <p> b <q>").input_ids == wanted
        assert isinstance(twin, tokenizer_class)
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer_class.from_pretrained(tmp_path)) is tokenizer_class
    vocabulary.remove_(tokenizer, {"<q>"})
    assert len(tokenizer("<p>", add_special_tokens=False).input_ids) == 3
    vocabulary.remove_(tokenizer, {"<p>", "<p>_1", "<p>_2"})
    assert type(tokenizer) is tokenizer_class
    assert tokenizer.get_vocab() == build().get_vocab()
    assert tokenizer("a <p> b").input_ids == build()("a <p> b").input_ids
    assert tokenizer.__dict__.keys() == build().__dict__.keys()


@torch.no_grad()
def test_tokens_follow_a_text_encoder_whose_embedding_is_replaced() -> None:
    class Other(nn.Embedding):
        """An embedding as a library for quantising makes it, here with the same values."""

    def replaced(change: int = 0) -> nn.Embedding:
        new = Other(old.num_embeddings, old.embedding_dim + change)
        new.weight.data = torch.cat([old.weight, old.weight[:, :change]], 1)
        return new

    pipe = models.sd15()
    encoder: Any = pipe.text_encoder
    old = encoder.get_input_embeddings()
    before = snapshot(encoder)
    pipe.load_adapter(bundle({"pix": {"clip_l": vectors(1)}}), "tokens")
    ids = pipe.tokenizer("a pix", return_tensors="pt").input_ids
    assert ids.max() >= old.num_embeddings
    expected = encoder(ids).last_hidden_state
    new = replaced()
    encoder.set_input_embeddings(new)
    assert torch.equal(encoder(ids).last_hidden_state, expected)
    assert "_diffadapt_tokens" not in vars(old)
    encoder.set_input_embeddings(replaced(change=2))
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"replaced after adapter 'tokens'.*expected an embedding of \d+ x \d+"):
            encoder(ids)
    encoder.set_input_embeddings(new)
    assert torch.equal(encoder(ids).last_hidden_state, expected)
    pipe.adapters.clear()
    assert type(new) is Other
    encoder.set_input_embeddings(old)
    assert_unchanged(encoder, before)
