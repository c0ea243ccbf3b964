"""What the trainer relies on in every family, besides its agreement with the pipeline."""

import importlib
import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt.errors import AdapterError
from diffadapt.training.families import FAMILIES, TrainingFamily, family_of, latents
from tests.support import training_oracle as oracle
from tests.support.cases import for_each
from tests.support.silence import ignored
from tests.support.tiny_pipelines import TINY, shared, tiny

TOKENS = oracle.TOKENS
OF_ONE_LENGTH = ("cogview4", "qwen-image-2.1")


def encode(family: TrainingFamily, pipe: Any, text: str) -> dict[str, Tensor]:
    pictures = [torch.zeros(3, 64, 128)] if family.references[0] else []
    return family.encode_caption(pipe, text, pictures=pictures, max_tokens=TOKENS)


def to_bfloat16(model: nn.Module) -> None:
    """Cast a model as `from_pretrained` does, which keeps some modules in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for path, parameter in model.named_parameters():
        if not any(name in path.split(".") for name in kept):
            parameter.data = parameter.data.to(torch.bfloat16)


def references_of(family: TrainingFamily, pipe: Any, batch: int) -> dict[str, Tensor]:
    if not family.references[0]:
        return {}
    assert family.encode_references is not None
    pictures = [torch.rand(batch, 3, 32, 64) * 2 - 1]
    return family.encode_references(pipe, pictures, torch.ones(batch, 1, 32, 64) if family.needs_mask else None)


@torch.no_grad()
def noisy_batch(family: TrainingFamily, pipe: Any, batch: int) -> tuple[Tensor, Tensor]:
    x0 = latents(family.encode_pictures(pipe, torch.rand(batch, 3, 32, 64) * 2 - 1))
    is_flow = family.process(pipe) == "flow"
    level = torch.linspace(0.3, 0.7, batch) if is_flow else torch.linspace(300, 700, batch).long()
    return x0 + torch.randn_like(x0), level


@for_each(name=TINY)
def test_a_caption_is_predicted_alike_alone_and_beside_a_longer_one(name: str) -> None:
    pipe = shared(name)
    family = family_of(pipe)
    with torch.no_grad():
        rows = [encode(family, pipe, text) for text in oracle.CAPTIONS]
    if not family.mixed_lengths:
        assert family.name in OF_ONE_LENGTH
        long = {key: torch.cat([value, value]) for key, value in rows[0].items()}
        with pytest.raises(AdapterError, match=f"{family.name}.*tokens.*batch size of 1"):
            family.collate([rows[0], long])
        return
    noisy, level = noisy_batch(family, pipe, 2)
    references = references_of(family, pipe, 2)
    denoiser = getattr(pipe, next(iter(family.experts(pipe))))
    with torch.no_grad():
        both = family.predict(pipe, denoiser, noisy, level, family.collate(rows), references=references)
        first = {key: value[:1] for key, value in references.items()}
        alone = family.predict(pipe, denoiser, noisy[:1], level[:1], family.collate(rows[:1]), references=first)
        another = family.predict(pipe, denoiser, noisy[:1], level[:1], family.collate(rows[1:]), references=first)
    assert oracle.relative(both[:1], alone) < 1e-5
    assert oracle.relative(another, alone) > 5e-5


@for_each(name=TINY)
def test_the_usual_targets_and_text_encoders_are_trained_and_half_precision_works(name: str) -> None:
    pipe = tiny(name)
    family = family_of(pipe)
    component = next(iter(family.experts(pipe)))
    denoiser = getattr(pipe, component)
    targets = family.targets if isinstance(family.targets, str) else list(family.targets)
    adapter = diffadapt.add_adapter(denoiser, diffadapt.LoraConfig(rank=2, target_modules=targets), name="new")
    if isinstance(targets, list):
        paths = [path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        assert [t for t in targets if not any(f".{path}".endswith(f".{t}") for path in paths)] == []
    encoder = pipe.text_encoder
    embedding = encoder.get_input_embeddings().weight.requires_grad_(True)
    noisy, level = noisy_batch(family, pipe, 1)
    conditions = family.collate([encode(family, pipe, "a photo of sks dog")])
    references = references_of(family, pipe, 1)
    prediction = family.predict(pipe, denoiser, noisy, level, conditions, references=references)
    assert prediction.shape == noisy.shape
    assert prediction.dtype == torch.float32
    prediction.square().mean().backward()
    ups = [parameter for path, parameter in adapter.named_parameters() if "up" in path or "lora_B" in path]
    moved = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in ups]
    # The last block of some models does not use what it makes of the caption, and experts may have no tokens.
    assert ups
    assert sum(moved) >= len(moved) / 2
    assert embedding.grad is not None
    assert embedding.grad.any()
    to_bfloat16(denoiser)
    with torch.no_grad():
        rounded = family.predict(pipe, denoiser, noisy, level, conditions, references=references)
    assert rounded.dtype == torch.float32
    assert 0 < oracle.relative(rounded, prediction.detach()) < 0.2


def test_dropped_captions_are_what_the_pipelines_guide_away_from() -> None:
    given = {"do_classifier_free_guidance": True, "device": "cpu"}
    sdxl, lumina2, sana, flux = (tiny(name) for name in ("sdxl", "lumina2", "sana", "flux"))
    dropped = family_of(sdxl).encode_dropped(sdxl)
    assert not dropped["hidden"].any()
    assert not dropped["pooled"].any()
    sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    assert family_of(sdxl).encode_dropped(sdxl)["hidden"].any()
    for pipe in (lumina2, sana):
        *_, hidden, mask = pipe.encode_prompt(["a dog"], max_sequence_length=TOKENS, **given)
        dropped = family_of(pipe).encode_dropped(pipe, max_tokens=TOKENS)["hidden"]
        assert torch.equal(dropped, hidden[0, mask[0].bool()])
        assert dropped.shape != family_of(pipe).encode_caption(pipe, "", max_tokens=TOKENS)["hidden"].shape
    again = family_of(flux).encode_caption(flux, "", max_tokens=TOKENS)
    assert torch.equal(family_of(flux).encode_dropped(flux, max_tokens=TOKENS)["hidden"], again["hidden"])


def test_defaults_are_those_of_the_pipelines() -> None:
    for family in FAMILIES:
        for name in family.pipelines:
            parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
            if "max_sequence_length" in parameters:
                assert family.max_tokens == parameters["max_sequence_length"].default, name
            else:
                assert family.max_tokens is None, name


@for_each(name=("qwen-image-edit", "qwen-image-edit-plus"))
def test_references_have_the_size_that_the_pipeline_gives_them(name: str) -> None:
    pipe = tiny(name)
    module = importlib.import_module(type(pipe).__module__)
    for height, width in ((480, 640), (1000, 300), (64, 64)):
        expected = module.calculate_dimensions(1024 * 1024, width / height)
        assert family_of(pipe).reference_size(pipe, (height, width), (512, 512)) == (expected[1], expected[0])


def test_references_of_flux2_keep_their_size_up_to_a_megapixel() -> None:
    pipe = tiny("flux2")
    size = family_of(pipe).reference_size
    assert size(pipe, (500, 300), (512, 512)) == (496, 288)
    height, width = size(pipe, (4000, 3000), (512, 512))
    assert height * width <= 1024 * 1024
    assert (height % 16, width % 16) == (0, 0)
    assert height / width == pytest.approx(4 / 3, rel=0.02)


def test_only_distilled_models_are_refused() -> None:
    distilled = ("flux-schnell", "hunyuan-image-distilled")
    reasons = {name: family_of(shared(name)).refusal(shared(name)) for name in TINY}
    assert {name for name, reason in reasons.items() if reason is not None} == set(distilled)
    assert all("helper adapter" in str(reasons[name]) for name in distilled)
    for name, path in (("sd3", "someone/large_turbo/"), ("hidream", "HiDream-ai/HiDream-I1-Fast")):
        pipe = tiny(name)
        pipe.register_to_config(_name_or_path=path)
        assert path in str(family_of(pipe).refusal(pipe))
        # Only whole words count, and not those of folders above.
        pipe.register_to_config(_name_or_path="/turbo/fasting-turbochargers")
        assert family_of(pipe).refusal(pipe) is None


def test_distilled_models_are_recognised_by_their_configs() -> None:
    klein, krea2, zimage, sd, sdxl = (tiny(name) for name in ("flux2-klein", "krea2", "z-image", "sd", "sdxl"))
    klein.register_to_config(is_distilled=True)
    krea2.register_to_config(is_distilled=True)
    zimage.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    sd.register_modules(scheduler=diffusers.LCMScheduler())
    with ignored(DeprecationWarning):  # NumPy's, in the scheduler
        ancestral = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    sdxl.register_modules(scheduler=ancestral)
    for pipe, sign in (
        (klein, "is_distilled"),
        (krea2, "is_distilled"),
        (zimage, "shift 3"),
        (sd, "LCM"),
        (sdxl, "trailing"),
    ):
        reason = family_of(pipe).refusal(pipe)
        assert reason is not None
        assert sign in reason


def test_models_that_cannot_be_trained_are_refused() -> None:
    pipe = tiny("sd")
    assert family_of(pipe).process(pipe) == "epsilon"
    pipe.register_modules(scheduler=diffusers.DDIMScheduler(prediction_type="sample"))
    with pytest.raises(AdapterError, match=r"DDIMScheduler.*'sample'.*'v_prediction'"):
        family_of(pipe).process(pipe)
    pipe.register_modules(scheduler=diffusers.EDMEulerScheduler())
    with pytest.raises(AdapterError, match=r"EDMEulerScheduler.*alphas_cumprod"):
        family_of(pipe).process(pipe)
    hidream = tiny("hidream")
    hidream.register_modules(text_encoder_4=None)
    with pytest.raises(AdapterError, match=r"no text_encoder_4.*LlamaForCausalLM"):
        family_of(hidream).process(hidream)
    inpainting = tiny("sd")
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(AdapterError, match=r"reads 9 channels.*text-to-image"):
        family_of(inpainting).process(inpainting)


def test_the_family_of_an_unknown_pipeline_is_refused_and_of_a_derived_one_found() -> None:
    class Mine(diffusers.FluxPipeline):
        pass

    assert family_of(Mine.__new__(Mine)).name == "flux"
    with pytest.raises(AdapterError, match=r"cannot train a DDPMPipeline.*FluxPipeline"):
        family_of(diffusers.DDPMPipeline.__new__(diffusers.DDPMPipeline))


def test_experts_of_wan_share_the_levels() -> None:
    pipe = tiny("wan-2.2")
    assert family_of(pipe).experts(pipe) == {"transformer": (0.9, 1.0), "transformer_2": (0.0, 0.9)}
    assert family_of(pipe).experts(tiny("wan")) == {"transformer": (0.0, 1.0)}


def test_latents_are_drawn_from_the_distribution_of_the_autoencoder() -> None:
    pipe = tiny("sdxl")
    encoded = family_of(pipe).encode_pictures(pipe, torch.zeros(1, 3, 32, 64))
    assert torch.equal(latents(encoded), encoded["mean"])
    noise = torch.randn_like(encoded["mean"])
    torch.manual_seed(3)
    drawn = pipe.vae.encode(torch.zeros(1, 3, 32, 64)).latent_dist
    expected = (drawn.mean + drawn.std * noise) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents(encoded, noise), expected)
    flux2 = tiny("flux2")
    only_mean = family_of(flux2).encode_pictures(flux2, torch.zeros(1, 3, 32, 64))
    assert torch.equal(latents(only_mean, noise), only_mean["mean"])


def test_the_shift_of_a_multi_step_solver_is_found_under_its_name() -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for name, scheduler in (("wan", "UniPCMultistepScheduler"), ("sana", "DPMSolverMultistepScheduler")):
        pipe = tiny(name)
        latent = torch.zeros(1, 4, 4, 8)
        pipe.register_modules(scheduler=getattr(diffusers, scheduler)(flow_shift=5.0, **flow))
        assert family_of(pipe).process(pipe) == "flow"
        assert family_of(pipe).shift(pipe, latent) == 5.0


def test_a_caption_that_the_pipeline_refuses_is_named() -> None:
    pipe = tiny("ideogram4")
    with pytest.raises(AdapterError, match=r"'a dog a dog.*max_sequence_length is 8"):
        family_of(pipe).encode_caption(pipe, "a dog " * 8, max_tokens=8)
