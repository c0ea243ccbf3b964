"""New words and retrained rows: vectors alone are trained, whatever the text encoder and whatever hooks it has."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_layerwise_casting
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support import models
from tests.support.bases import EMBEDDINGS, Base, silenced
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.text_encoders import TEXT_ENCODERS
from tests.support.tied import IDS

ROOT = Path(__file__).parents[2]
FAMILIES: dict[str, Callable[[], Any]] = {"sd15": models.sd15, "sdxl": models.sdxl, "flux": models.flux}


def tiny() -> StableDiffusionPipeline:
    """Return the embedded pipeline, whose tokenizer knows words."""
    return StableDiffusionPipeline.from_pretrained(ROOT / "examples" / "tiny_pipeline", safety_checker=None)


def encoded(pipe: Any, prompt: str) -> Tensor:
    with torch.no_grad():
        tokens = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        return pipe.text_encoder(tokens).last_hidden_state


# New words


@pytest.mark.slow
def test_new_words_start_as_asked_and_are_all_that_is_trained() -> None:
    pipe: Any = tiny()
    before, base = snapshot(pipe), encoded(pipe, "a cat on a red background")
    words = {"<cat>": "cat", "<mean>": ["cat", "star"], "<two>": (2, "cat"), "<free>": 3, "<given>": torch.ones(1, 64)}
    adapter = diffadapt.add_tokens(pipe, words, "w")
    (vectors,) = adapter.parameters()
    assert (vectors.shape, vectors.dtype, vectors.requires_grad) == ((8, 64), torch.float32, True)
    assert_same(encoded(pipe, "a <cat> on a red background"), base, 0)
    assert_same(encoded(pipe, "a <two> on a star"), encoded(pipe, "a cat cat on a star"), 0)
    table = pipe.text_encoder.get_input_embeddings().weight
    ids = [pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "star")]
    assert_same(vectors[1], table[ids].mean(0))
    assert torch.equal(vectors[-1], torch.ones(64))
    drawn = vectors[4:7]
    assert 0.5 < float((drawn.std() / table.std()).detach()) < 2
    assert not torch.equal(drawn[0], drawn[1])
    tokens = pipe.tokenizer("a <cat> on a <free>", padding="max_length", return_tensors="pt").input_ids
    pipe.text_encoder.requires_grad_(False)
    vectors.requires_grad_()
    pipe.text_encoder(tokens).last_hidden_state.square().sum().backward()
    assert vectors.grad is not None
    assert [bool(row.any()) for row in vectors.grad] == [True, False, False, False, True, True, True, False]
    pipe.text_encoder.requires_grad_(True)
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


@for_each(family=list(FAMILIES), format=["kohya", "onetrainer", "comfy"])
def test_new_words_are_in_every_text_encoder_and_in_any_file(family: str, format: str, tmp_path: Path) -> None:
    pipe, again = FAMILIES[family](), FAMILIES[family]()
    found = diffadapt.add_tokens(pipe, {"<a>": 1, "<b>": 2}, "w")
    by_component = found if isinstance(found, dict) else {"text_encoder": found}
    assert list(by_component) == [name for name in pipe.components if name.startswith("text_encoder")]
    report = again.load_adapter(pipe.adapters.save("w", tmp_path / "w.safetensors", format), "w")
    assert report.tokens == {"<a>": 1, "<b>": 2}
    for component in by_component:
        vectors = [next(iter(p.adapters["w"].components[component].parameters())).detach() for p in (pipe, again)]
        assert torch.equal(*vectors)


def test_files_of_a_single_word_and_of_pivotal_tuning_are_those_of_other_programs(tmp_path: Path) -> None:
    pipe = models.sd15()
    adapter = diffadapt.add_tokens(pipe, {"<cat>": 2}, "w")
    (vectors,) = adapter.parameters()
    assert set(load_file(pipe.adapters.save("w", tmp_path / "<cat>.safetensors", "kohya"))) == {"emb_params"}
    assert set(load_file(pipe.adapters.save("w", tmp_path / "x.safetensors", "kohya"))) == {"bundle_emb.<cat>.clip_l"}
    learned = pipe.adapters.save("w", tmp_path / "learned_embeds.safetensors", "diffusers")
    assert torch.equal(load_file(learned)["<cat>"], vectors)
    plain = models.sd15()
    plain.load_textual_inversion(str(learned))
    ids = plain.tokenizer("<cat> <cat>_1", add_special_tokens=False).input_ids
    assert torch.equal(plain.text_encoder.get_input_embeddings()(torch.tensor(ids)), vectors)
    for path in (tmp_path / "<cat>.safetensors", tmp_path / "x.safetensors", learned):
        assert models.sd15().load_adapter(path).tokens == {"<cat>": 2}

    pipe, again = models.sdxl(), models.sdxl()
    pivotal = diffadapt.add_tokens(pipe, {"<s0>": 1, "<s1>": 1}, "w")
    with pytest.raises(AdapterError, match=r"save them as '\.\.\._emb\.safetensors'"):
        pipe.adapters.save("w", tmp_path / "w.safetensors", "diffusers")
    path = pipe.adapters.save("w", tmp_path / "w_emb.safetensors", "diffusers")
    assert {key: tuple(tensor.shape) for key, tensor in load_file(path).items()} == {
        "clip_l": (2, 32),
        "clip_g": (2, 32),
    }
    assert again.load_adapter(path, "w").tokens == {"<s0>": 1, "<s1>": 1}
    assert torch.equal(
        *(next(iter(p["text_encoder_2"].parameters())) for p in (pivotal, again.adapters["w"].components))
    )


@pytest.mark.slow
@for_each(words_first=[True, False])
def test_words_and_a_lora_are_one_adapter_in_one_file(words_first: bool, tmp_path: Path) -> None:
    pipe, again = models.sd15(), models.sd15()
    config = diffadapt.LoraConfig(rank=2, target_modules=["q_proj"], init=False)
    steps: list[Callable[[], Any]] = [
        lambda: diffadapt.add_tokens(pipe, {"<cat>": 2}, "mine"),
        lambda: diffadapt.add_adapter(pipe.text_encoder, config, "mine"),
    ]
    for step in steps if words_first else steps[::-1]:
        step()
    diffadapt.add_adapter(pipe.unet, diffadapt.LoraConfig(rank=2, target_modules=["to_q"], init=False), "mine")
    assert pipe.adapters.names == ["mine"]
    report = again.load_adapter(pipe.adapters.save("mine", tmp_path / "mine.safetensors", "kohya"), trainable=True)
    assert report.tokens == {"<cat>": 2}
    prompts = [encoded(p, "a <cat> on a mat") for p in (pipe, again)]
    assert_same(prompts[1], prompts[0])
    assert all(parameter.requires_grad for parameter in again.adapters["mine"].parameters())
    assert len(list(again.adapters["mine"].parameters())) == len(list(pipe.adapters["mine"].parameters()))


def test_a_model_alone_numbers_new_words_after_its_rows() -> None:
    model = TEXT_ENCODERS["llama"]().eval()
    before, rows = snapshot(model), model.get_input_embeddings().num_embeddings
    first = diffadapt.add_tokens(model, {"<a>": 2}, "first")
    second = diffadapt.add_tokens(model, {"<b>": 1}, "second")
    (one,), (other,) = first.parameters(), second.parameters()
    assert_same(model.get_input_embeddings()(torch.arange(rows, rows + 3)), torch.cat([one, other]))
    diffadapt.adapters(model).remove("first")
    assert_same(model.get_input_embeddings()(torch.tensor([rows])), other)
    diffadapt.adapters(model).clear()
    assert_unchanged(model, before)


REFUSED: dict[str, Any] = {
    "knows 'cat' already": {"cat": "star"},
    "starts from '': expected|does not know": {"<x>": ""},
    "expected a whole number of at least 1": {"<x>": 0},
    "expected a number of vectors": {"<x>": []},
    r"expected \(count, 64\)": {"<x>": torch.ones(2, 3)},
    "is no new word": {" x": 1},
    "the words are": {},
}


@pytest.mark.slow
def test_words_that_cannot_be_added_change_nothing() -> None:
    pipe: Any = tiny()
    before, known = snapshot(pipe), pipe.tokenizer.get_vocab()
    for message, words in REFUSED.items():
        with pytest.raises(AdapterError, match=message):
            diffadapt.add_tokens(pipe, words)
    with pytest.raises(AdapterError, match="pass the pipeline, or tokenizer="):
        diffadapt.add_tokens(pipe.text_encoder, {"<x>": "cat"})
    with pytest.raises(AdapterError, match="no text encoder nope"):
        diffadapt.add_tokens(pipe, {"<x>": 1}, components=["nope"])
    assert_unchanged(pipe, before)
    assert pipe.tokenizer.get_vocab() == known
    diffadapt.add_tokens(pipe.text_encoder, {"<x>": 1}, tokenizer=pipe.tokenizer)
    with pytest.raises(AdapterError, match="has words already"):
        diffadapt.add_tokens(pipe, {"<y>": 1})


# Retrained rows


def retrained(model: nn.Module, ids: list[int], name: str = "a", seed: int = 0, **options: Any) -> Any:
    """Return an adapter that has other rows for some ids."""
    adapter = diffadapt.add_adapter(model, diffadapt.TokensConfig(token_indices=ids, **options), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return adapter


def states(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state if not hasattr(model, "lm_head") else model(input_ids=IDS).logits


@pytest.mark.slow
@for_each(encoder=[name for name in TEXT_ENCODERS if name != "siglip"])
def test_every_text_encoder_reads_retrained_rows(encoder: str) -> None:
    """The right values are those of a model with these rows in its weight."""
    model = TEXT_ENCODERS[encoder]().eval()
    expected, base = copy.deepcopy(model), states(model)
    adapter = retrained(model, [3, 5], ensure_weight_tying=True)
    (rows,) = adapter.parameters()
    weight = expected.get_input_embeddings().weight
    assert rows.shape == (2, weight.shape[1])
    with torch.no_grad():
        weight[[3, 5]] = rows
    assert_differs(states(model), base)
    assert_same(states(model), states(expected))
    own = model.get_input_embeddings().weight.detach().clone()
    diffadapt.adapters(model).merge("a")
    changed = (model.get_input_embeddings().weight != own).any(1).nonzero().flatten().tolist()
    assert changed == [3, 5]
    diffadapt.adapters(model).unmerge()
    assert torch.equal(model.get_input_embeddings().weight, own)


def embedding(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(40, 16, **options))


def test_adapters_on_different_rows_join_and_on_the_same_row_add_up() -> None:
    model = embedding().double()
    base = model(IDS).detach()
    first, second = retrained(model, [1, 3], "a"), retrained(model, [3, 5], "b", seed=1)
    assert all(parameter.dtype == torch.float32 for parameter in (*first.parameters(), *second.parameters()))
    adapters = diffadapt.adapters(model)
    adapters.activate({"a": 0.5, "b": 2.0})
    expected = model[0].weight.detach().clone()
    for adapter, ids, strength in ((first, [1, 3], 0.5), (second, [3, 5], 2.0)):
        expected[ids] += strength * (next(adapter.parameters()).detach().double() - model[0].weight.detach()[ids])
    assert_same(model(IDS), expected[IDS])
    assert torch.equal(model(IDS)[0, 3:], base[0, 3:])
    adapters.activate({"a": 1.0, "b": 0.0})
    assert_same(model(IDS)[0, 2], base[0, 2], 0)
    adapters.deactivate()
    assert_same(model(IDS), base, 0)


@for_each(dtype=[torch.float16, torch.bfloat16])
def test_rows_are_merged_into_half_precision_and_out_again(dtype: torch.dtype) -> None:
    model = embedding().to(dtype)
    weight = model[0].weight.detach().clone()
    adapter = retrained(model, [1, 3])
    for compact in (False, True):
        diffadapt.adapters(model).merge("a", compact=compact)
        assert (model[0].weight != weight).any(1).nonzero().flatten().tolist() == [1, 3]
        assert_same(model[0].weight[[1, 3]], next(adapter.parameters()), 2 * torch.finfo(dtype).eps)
        diffadapt.adapters(model).unmerge()
        assert torch.equal(model[0].weight, weight)


def test_rows_are_swapped_in_slots_and_have_a_strength_for_every_sample() -> None:
    model, files = embedding(), []
    for seed, ids in enumerate(([1, 3], [5], [2, 3, 7])):
        retrained(model, ids, seed=seed)
        files.append(
            {
                f"0.{name}": tensor.detach().clone()
                for name, tensor in diffadapt.adapters(model)["a"].components["model"].layers["0"].tensors.items()
            }
        )
        diffadapt.adapters(model).clear()
    adapters = diffadapt.adapters(model)
    outputs: list[Tensor] = []
    for file in files:
        diffadapt.load_adapter(model, file, "a", component="model")
        outputs.append(model(IDS).detach().clone())
        adapters.clear()
    adapters.prepare_hotswap(files, slots=1, samples=2)
    diffadapt.load_adapter(model, files[0], "a", component="model")
    for file, expected in zip(files, outputs, strict=True):
        adapters.hotswap("a", file)
        assert_same(model(IDS), expected)
    with adapters.per_sample([{"a": 1.0}, {}]):
        assert_same(model(IDS.expand(2, -1))[0], outputs[2][0])
        assert_same(model(IDS.expand(2, -1))[1], embedding()(IDS)[0], 0)


def _cast(model: nn.Module) -> None:
    apply_layerwise_casting(model[0], torch.float8_e4m3fn, torch.float32, skip_modules_classes=())  # type: ignore[index]


def _offloaded(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.slow
@for_each(hook=[_cast, _offloaded], hook_first=[True, False])
def test_rows_act_under_casting_and_offloading(hook: Callable[[nn.Module], None], hook_first: bool) -> None:
    model = embedding()
    if hook is _cast:
        model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn).float()
    base = model(IDS).detach()
    if hook_first:
        hook(model)
    adapter = retrained(model, [1, 3])
    if not hook_first:
        hook(model)
    expected = base.clone()
    expected[0, :2] = next(adapter.parameters()).detach()
    assert_same(model(IDS), expected)
    model(IDS).sum().backward()
    assert next(adapter.parameters()).grad is not None
    diffadapt.adapters(model).deactivate()
    assert_same(model(IDS), base, 0)


@pytest.mark.slow
def test_a_compiled_text_encoder_reads_rows_and_follows_training() -> None:
    model = embedding()
    adapter = retrained(model, [1, 3])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(IDS).square().sum().backward()
        gradient = next(adapter.parameters()).grad
        assert gradient is not None
        expected = 2 * next(adapter.parameters()).detach()
        assert_same(gradient, expected)
        with torch.no_grad():
            next(adapter.parameters()).sub_(0.1 * gradient)
        model.zero_grad()
    with torch.no_grad():
        assert_same(compiled(IDS), model(IDS))


def test_memory_is_that_of_the_rows() -> None:
    """The matrix is neither copied nor given a gradient."""
    model = nn.Sequential(nn.Embedding(4096, 64)).requires_grad_(False)
    adapter = retrained(model, list(range(8)))
    optimizer = torch.optim.AdamW(adapter.parameters())
    model(torch.arange(16).view(1, -1)).sum().backward()
    optimizer.step()
    assert model[0].weight.grad is None
    state = [value for found in optimizer.state.values() for value in found.values()]
    tensors = [
        *adapter.parameters(),
        *(parameter.grad for parameter in adapter.parameters()),
        *adapter.buffers(),
        *state,
    ]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) < 4 * 8 * 64 * 4 + 256
    kept = adapter.layers["0"].__dict__.get("_rows", {})
    assert kept == {}


TOKENS_REFUSED: dict[str, dict[str, Any]] = {
    "40 is beyond the embedding, which has 40 rows; new words get vectors with add_tokens": {"token_indices": [40]},
    "has 3 more than once": {"token_indices": [3, 3]},
    "has -1, expected": {"token_indices": [-1]},
    "expected a list of at least one": {"token_indices": []},
    "is none of 0": {"token_indices": {"0": [1], "other": [2]}, "target_modules": ["0"]},
    "dropout has no effect": {"token_indices": [1], "dropout": 0.1},
}


def test_rows_that_do_not_exist_are_refused() -> None:
    model = embedding()
    before = snapshot(model)
    for message, options in TOKENS_REFUSED.items():
        with pytest.raises(AdapterError, match=message):
            diffadapt.add_adapter(model, diffadapt.TokensConfig(**options))
    assert_unchanged(model, before)
    with pytest.raises(AdapterError, match="does not say which layer embeds its tokens"):
        diffadapt.add_adapter(nn.Sequential(nn.Linear(2, 2)), diffadapt.TokensConfig(token_indices=[1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@for_each(base=[base for base in EMBEDDINGS if not base.needs or find_spec(base.needs.split(".")[0])])
def test_rows_act_exactly_on_quantised_embeddings(base: Base) -> None:
    torch.manual_seed(0)
    with silenced():
        model = nn.Sequential(base.make(torch.randn(40, 64), None))
        output = model(IDS).detach().clone()
        adapter = retrained(model, [1, 3], target_modules=["0"])
        expected = output.float()
        expected[0, :2] = next(adapter.parameters()).detach()
        assert_same(model(IDS).float(), expected)
        model(IDS).float().sum().backward()
    assert next(adapter.parameters()).grad is not None
    assert len(adapter.layers["0"].__dict__.get("_rows", {})) <= 1
