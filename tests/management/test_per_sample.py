"""`per_sample`: every prompt of a batch has its own mix of adapters. `activated`: an activation for one context."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same
from tests.support.small_models import unet
from tests.support.versions import at_least, needs

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "a blue square on a hill", "two stars"]
Mix = dict[str, Any]
MIXES: list[Mix] = [{"a": 1.0}, {"b": 0.7, "a": 0.3}, {}]
DENOISERS = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}


def drawn(
    pipe: DiffusionPipeline, prompts: list[str] | None, first: int, images: int = 2, count: int = 0, **options: Any
) -> Tensor:
    """Return latents; the noise of a picture depends on its number alone.

    Args:
        count: number of prompts, if they are given as embeddings.
    """
    rows = (count if prompts is None else len(prompts)) * images
    generators = [torch.Generator().manual_seed(first * images + i) for i in range(rows)]
    options = {"guidance_scale": 4.0, "num_inference_steps": 2, "height": 16, "width": 16, **options}
    with torch.no_grad():
        return pipe(
            prompt=prompts,
            num_images_per_prompt=images,
            generator=generators if len(generators) > 1 else generators[0],
            output_type="latent",
            **options,
        ).images


def loaded(family: str, dora: bool = False) -> DiffusionPipeline:
    pipe = models.FAMILIES[family]()
    denoiser = DENOISERS[family]
    components = (denoiser, "text_encoder", *(("text_encoder_2",) if family != "sd15" else ()))
    pattern = r"to_[qkv]|[qkv]_proj|fc1|q|v|conv1"
    for name, rank in (("a", 4), ("b", 2)):
        parts = loras.parts_for(pipe, components if name == "a" else (denoiser,), pattern, rank)
        pipe.load_adapter(spellings.peft_names(parts), name, activate=False)
    if dora:
        config = diffadapt.LoraConfig(rank=2, use_dora=True, target_modules=["to_q", "to_v"], init=False)
        diffadapt.add_adapter(getattr(pipe, denoiser), config, "c")
    return pipe


@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "plain"])
def test_every_row_of_a_batch_equals_a_separate_run(family: str, guidance: float) -> None:
    if family == "sd3":
        needs("diffusers", "0.36", "Stable Diffusion 3 with several prompts and several pictures of each")
    pipe = loaded(family)
    alone: list[Tensor] = []
    for number, mix in enumerate(MIXES):
        pipe.adapters.activate(mix)
        alone.append(drawn(pipe, PROMPTS[number : number + 1], number, guidance_scale=guidance))
    pipe.adapters.activate({"b": 0.5})
    with pipe.adapters.per_sample(MIXES):
        together = drawn(pipe, PROMPTS, 0, guidance_scale=guidance)
    assert_same(together, torch.cat(alone), 2e-5)
    assert pipe.adapters.active == {"b": 0.5}
    for number, mix in enumerate(MIXES):
        with pipe.adapters.activated({} if mix else {"a": 1.0}):
            other = drawn(pipe, PROMPTS[number : number + 1], number, guidance_scale=guidance)
        assert_differs(other, alone[number], 1e-4)


def test_embeddings_of_other_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before diffusers 0.36, Stable Diffusion 3 mixes up pooled embeddings, with and without adapters."""
    pipe = loaded("sd3")
    encode = type(pipe)._get_clip_prompt_embeds

    def mixed_up(self: Any, prompt: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        embeddings, pooled = encode(self, prompt, *args, **kwargs)
        return embeddings, pooled.unflatten(0, (len(prompt), -1)).transpose(0, 1).flatten(0, 1)

    if at_least("diffusers", "0.36"):
        monkeypatch.setattr(type(pipe), "_get_clip_prompt_embeds", mixed_up)
    with pipe.adapters.per_sample(MIXES):
        with pytest.raises(diffadapt.AdapterError, match=r"3 prompts and 2 images of each, .* of another prompt"):
            drawn(pipe, PROMPTS, 0)
        assert drawn(pipe, PROMPTS, 0, images=1).isfinite().all()


def test_other_mixes_do_not_recompile_a_denoiser(counter: CompileCounterWithBackend) -> None:
    pipe, plain = models.sd15(), models.sd15()
    for owner in (pipe, plain):
        owner.unet = unet()
        parts = loras.parts_for(owner, pattern=r"to_[qv]|q_proj")
        sources = {
            "a": spellings.peft_names(parts),
            "b": spellings.peft_names({"unet": loras.parts_for(owner, rank=2)["unet"]}),
        }
        if owner is pipe:
            pipe.adapters.prepare_hotswap(list(sources.values()), slots=2, samples=2)
        for name, source in sources.items():
            owner.load_adapter(source, name)
    bare = pipe.unet
    pipe.unet = torch.compile(bare, backend=counter, fullgraph=True)
    uniform = drawn(pipe, PROMPTS[:2], 0)
    assert_same(uniform, drawn(plain, PROMPTS[:2], 0), 2e-5)
    assert counter.frame_count == 1
    mixes: list[list[Mix]] = [[{"a": 1.0}, {"b": 0.5}], [{}, {"a": 0.25, "b": {"unet.down_blocks": 2.0}}], [{}, {}]]
    for chosen in mixes:
        with pipe.adapters.per_sample(chosen):
            compiled = drawn(pipe, PROMPTS[:2], 0)
        with plain.adapters.per_sample(chosen):
            assert_same(compiled, drawn(plain, PROMPTS[:2], 0), 2e-5)
        assert_differs(compiled, uniform, 1e-3)
    assert_same(drawn(pipe, PROMPTS[:2], 0), uniform)
    assert counter.frame_count == 1
    pipe.unet = bare
    # In a batch of another size, all samples have to have the same mix.
    assert_same(drawn(pipe, PROMPTS[:1], 0, images=1), drawn(plain, PROMPTS[:1], 0, images=1), 2e-5)
    with pytest.raises(diffadapt.AdapterError, match=r"3 mixes, but the slots of .* are for 2 samples"):
        with pipe.adapters.per_sample(MIXES):
            pass


def test_invalid_mixes_and_other_batches_are_refused() -> None:
    pipe = loaded("sd15")
    pipe.adapters.activate({"a": 0.5})
    before = drawn(pipe, PROMPTS[:2], 0)
    with pytest.raises(diffadapt.AdapterError, match="no adapter 'z'"), pipe.adapters.per_sample([{"z": 1.0}]):
        pass
    with pytest.raises(diffadapt.AdapterError, match="no mixes"), pipe.adapters.per_sample([]):
        pass
    with pytest.raises(diffadapt.AdapterError, match="pass as many prompts"), pipe.adapters.per_sample(MIXES):
        drawn(pipe, PROMPTS[:2], 0)
    with pytest.raises(diffadapt.AdapterError, match="inside per_sample"), pipe.adapters.per_sample(MIXES):
        pipe.adapters.merge("a")
    assert pipe.adapters.active == {"a": 0.5}
    assert torch.equal(drawn(pipe, PROMPTS[:2], 0), before)
    pipe.adapters.merge("a")
    with pytest.raises(diffadapt.AdapterError, match="merged"), pipe.adapters.per_sample(MIXES):
        pass


@pytest.mark.parametrize("guidance", [2.5, 1.0], ids=["guided", "plain"])
@pytest.mark.parametrize(
    ("mixes", "prompts", "images"), [(2, 1, 1), (2, 1, 2), (2, 3, 1), (3, 2, 3), (4, 2, 1), (1, 2, 1)]
)
def test_another_number_of_prompts_than_mixes_is_refused(
    mixes: int, prompts: int, images: int, guidance: float
) -> None:
    pipe = loaded("sd15")
    chosen = [MIXES[number % 3] for number in range(mixes)]
    message = rf"{mixes} mixes, but the pipeline encodes {prompts} prompts; pass as many prompts"
    options: dict[str, Any] = {"images": images, "guidance_scale": guidance}
    with pipe.adapters.per_sample(chosen), pytest.raises(diffadapt.AdapterError, match=message):
        drawn(pipe, PROMPTS[:prompts], 0, **options)
    with torch.no_grad():
        embeddings = pipe.encode_prompt(PROMPTS[:prompts], "cpu", 1, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds")
    with pipe.adapters.per_sample(chosen), pytest.raises(diffadapt.AdapterError, match=message):
        drawn(pipe, None, 0, count=prompts, **options, **dict(zip(names, embeddings, strict=True)))


def test_prompts_given_as_embeddings_are_counted() -> None:
    pipe = loaded("sd15")
    alone: list[Tensor] = []
    embeddings: list[tuple[Tensor, Tensor]] = []
    for number, mix in enumerate(MIXES):
        pipe.adapters.activate(mix)
        with torch.no_grad():
            embeddings.append(pipe.encode_prompt(PROMPTS[number], "cpu", 1, do_classifier_free_guidance=True))
        alone.append(drawn(pipe, PROMPTS[number : number + 1], number))
    positive, negative = (torch.cat(parts) for parts in zip(*embeddings, strict=True))
    with pipe.adapters.per_sample(MIXES):
        together = drawn(pipe, None, 0, count=3, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert_same(together, torch.cat(alone), 2e-5)


def test_a_pipeline_that_has_not_encoded_prompts_is_refused_and_a_model_takes_rows_as_samples() -> None:
    pipe = loaded("sd15")
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(1), torch.randn(2, 16, pipe.unet.config.cross_attention_dim)
    with pipe.adapters.per_sample(MIXES[:2]), pytest.raises(diffadapt.AdapterError, match="not encoded its prompts"):
        pipe.unet(*inputs)
    with pipe.adapters.per_sample(MIXES[:2]), pytest.raises(diffadapt.AdapterError, match="not encoded its prompts"):
        pipe.text_encoder(torch.zeros(2, 16, dtype=torch.long))
    with torch.no_grad():
        with diffadapt.adapters(pipe.unet).per_sample(MIXES[:2]):
            together = pipe.unet(*inputs).sample
        for row, mix in enumerate(MIXES[:2]):
            pipe.adapters.activate(mix)
            alone = pipe.unet(inputs[0][row : row + 1], inputs[1], inputs[2][row : row + 1]).sample
            assert_same(together[row : row + 1], alone, 2e-5)


def test_the_rows_of_a_model_without_a_pipeline_are_the_samples() -> None:
    """A batch of two rows for each mix may be guidance or other prompts, so only as many rows as mixes are taken."""
    pipe = loaded("sd15")
    unet = pipe.unet
    latents, text = torch.randn(6, 4, 8, 8), torch.randn(6, 16, unet.config.cross_attention_dim)

    def run(rows: slice | list[int]) -> Tensor:
        with torch.no_grad():
            return unet(latents[rows], torch.tensor(1), text[rows]).sample

    alone: dict[tuple[int, int], Tensor] = {}
    for number, mix in enumerate(MIXES[:2]):
        pipe.adapters.activate(mix)
        alone.update({(row, number): run([row]) for row in range(6)})
    adapters = diffadapt.adapters(unet)
    for rows in (1, 3, 4, 6):
        with (
            adapters.per_sample(MIXES[:2]),
            pytest.raises(diffadapt.AdapterError, match=rf"2 mixes .* has {rows} rows"),
        ):
            run(slice(rows))
    with adapters.per_sample(MIXES[:2] * 2):
        assert_same(run(slice(4)), torch.cat([alone[row, row % 2] for row in range(4)]), 2e-5)
    with adapters.per_sample(MIXES[:2], images=3):
        assert_same(run(slice(6)), torch.cat([alone[row, row // 3] for row in range(6)]), 2e-5)
    with adapters.per_sample(MIXES[:1]), pytest.raises(diffadapt.AdapterError, match="has 2 rows"):
        run(slice(2))
    # Run by its pipeline, the model learns the number of prompts there.
    pipe.adapters.deactivate()
    with adapters.per_sample(MIXES[:2]):
        together = drawn(pipe, PROMPTS[:2], 0, 1)
    for number, mix in enumerate(MIXES[:2]):
        adapters.activate(mix)
        assert_same(together[number : number + 1], drawn(pipe, PROMPTS[number : number + 1], number, 1), 2e-5)


def test_rows_that_are_not_counted_are_refused_in_a_whole_compiled_model() -> None:
    pipe = models.sd15()
    pipe.unet = bare = unet()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet",), "to_q")), "a")
    model = torch.compile(bare, backend="eager")
    inputs = torch.randn(4, 4, 8, 8), torch.tensor(1), torch.randn(4, 16, bare.config.cross_attention_dim)
    for owner, problem in ((pipe, "not encoded its prompts"), (bare, "has 4 rows")):
        with torch.no_grad(), diffadapt.adapters(owner).per_sample([{"a": 1.0}, {}]):
            with pytest.raises(diffadapt.AdapterError, match=problem):
                model(*inputs)


def test_the_number_of_images_of_a_pipeline_and_of_per_sample_must_agree() -> None:
    pipe = loaded("sd15")
    with pipe.adapters.per_sample(MIXES, images=3), pytest.raises(diffadapt.AdapterError, match="draws 2 images"):
        drawn(pipe, PROMPTS, 0)


def test_a_pipeline_that_does_not_say_its_number_of_images_is_asked_for_it() -> None:
    pipe = loaded("sd15")

    class Silent(type(pipe)):
        def encode_prompt(self, prompt: Any, device: Any, guided: bool) -> Any:
            return type(pipe).encode_prompt(self, prompt, device, 2, guided)

    silent = Silent(**pipe.components, requires_safety_checker=False)
    parts = torch.randn(12, 4, 8, 8), torch.tensor(1)
    for images, problem in ((None, "pass images="), (2, None)):
        with torch.no_grad(), silent.adapters.per_sample(MIXES, images=images):
            positive, negative = silent.encode_prompt(PROMPTS, "cpu", True)
            text = torch.cat([negative, positive])
            if problem is None:
                assert silent.unet(*parts, text).sample.isfinite().all()
            else:
                with pytest.raises(diffadapt.AdapterError, match=problem):
                    silent.unet(*parts, text)


def test_a_batch_can_mix_types_and_state_the_number_of_images() -> None:
    pipe = loaded("sd15", dora=True)
    mixes: list[Mix] = [{"c": 1.0}, {"a": 0.5, "c": -0.5}]
    alone: list[Tensor] = []
    for number, mix in enumerate(mixes):
        with pipe.adapters.activated(mix):
            alone.append(drawn(pipe, PROMPTS[number : number + 1], number))
    with pipe.adapters.per_sample(mixes, images=2):
        assert_same(drawn(pipe, PROMPTS[:2], 0), torch.cat(alone), 2e-5)


def test_activated_restores_exactly_what_was_active() -> None:
    pipe = loaded("sd15")
    adapters = pipe.adapters
    scale: Mapping[str, float] = {"unet.down_blocks": 0.5, "text_encoder": 0.0}
    adapters.activate({"a": scale})
    before = drawn(pipe, PROMPTS[:1], 0)
    with adapters.activated({"b": 2.0}):
        assert adapters.active == {"b": 2.0}
        inner = drawn(pipe, PROMPTS[:1], 0)
        with adapters.activated({"a": 1.0, "b": 1.0}):
            assert adapters.active == {"a": 1.0, "b": 1.0}
            with pytest.raises(RuntimeError, match="mine"), adapters.per_sample([{"a": 1.0}]):
                raise RuntimeError("mine")
            assert adapters.active == {"a": 1.0, "b": 1.0}
            adapters.remove("b")
        assert adapters.active == {}
    assert adapters.active == {"a": scale}
    assert torch.equal(drawn(pipe, PROMPTS[:1], 0), before)
    assert_differs(inner, before, 1e-3)
    with pytest.raises(diffadapt.AdapterError), adapters.activated({"a": float("nan")}):
        pass
    with adapters.activated("a"):
        adapters.hotswap("a", spellings.peft_names({"unet": loras.parts_for(pipe, rank=3)["unet"]}))
        pipe.load_adapter(spellings.peft_names({"unet": loras.parts_for(pipe, rank=1)["unet"]}), "new")
    assert adapters.active == {"a": scale}
    assert adapters["a"].ranks == (3,)


def test_sixteen_threads_draw_what_one_draws() -> None:
    pipe = loaded("sd15")
    pipe.adapters.activate({"a": 0.1})
    mixes: list[Mix] = [{"a": number / 8, "b": 1.0} if number % 3 else {"b": -number / 8} for number in range(16)]
    serial: list[Tensor] = []
    for number, mix in enumerate(mixes):
        with pipe.adapters.activated(mix):
            serial.append(drawn(pipe, PROMPTS[:1], number, 1))

    def request(number: int) -> Tensor:
        with pipe.adapters.activated(mixes[number]):
            return drawn(pipe, PROMPTS[:1], number, 1)

    with ThreadPoolExecutor(16) as pool:
        threaded = list(pool.map(request, range(16)))
    assert all(torch.equal(left, right) for left, right in zip(threaded, serial, strict=True))
    assert pipe.adapters.active == {"a": 0.1}


def test_a_call_during_the_request_of_another_thread_is_refused() -> None:
    pipe = loaded("sd15")
    inside, leave = Event(), Event()

    def request() -> None:
        with pipe.adapters.activated({"a": 1.0}):
            inside.set()
            leave.wait(60)

    def change() -> None:
        pipe.adapters.activate({"b": 1.0})

    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(request)
        inside.wait(60)
        with pytest.raises(diffadapt.AdapterError, match="another thread"):
            drawn(pipe, PROMPTS[:1], 0, 1)
        changing = pool.submit(change)
        assert pipe.adapters.active == {"a": 1.0}
        leave.set()
        holding.result(60)
        changing.result(60)
    assert pipe.adapters.active == {"b": 1.0}
    assert drawn(pipe, PROMPTS[:1], 0, 1).isfinite().all()
