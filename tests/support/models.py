"""Seeded random pipelines of every family, built from configs: the real block structure, but few channels per layer.

Structure and module names are those of the published models, so that the names in real checkpoints are found. Building
a pipeline takes a fraction of a second, and needs neither network nor files.
"""

import json
import string
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.support import versions

if TYPE_CHECKING:
    # diffusers 0.33 has none.
    from diffusers import ModularPipeline

TRANSFORMERS = int(transformers.__version__.split(".")[0])
CLIP_ROOT = "" if TRANSFORMERS >= 5 else "text_model."
"""The beginning of the paths in a text encoder of CLIP."""

WIDTH = 32
PROMPT = "a fox"


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of letters, letters at the end of a word, and the two special tokens, without merges."""
    tokens = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    if TRANSFORMERS >= 5:
        return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    with TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        for file, content in zip(files, (json.dumps(vocabulary), "#version: 0.2\n"), strict=True):
            file.write_text(content, encoding="utf-8")
        return CLIPTokenizer(*map(str, files), model_max_length=16)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -2.0) for letter in string.ascii_lowercase]
    if TRANSFORMERS < 5:
        # There, T5Tokenizer reads files of SentencePiece.
        words = Tokenizer(Unigram([*vocabulary, *letters], unk_id=2))
        words.pre_tokenizer = Metaspace()
        words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special)
    return T5Tokenizer(vocab=[*vocabulary, *letters], extra_ids=0, model_max_length=16)


def clip_text_config(layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_act="quick_gelu",
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def clip_text(layers: int = 2) -> CLIPTextModel:
    return CLIPTextModel(clip_text_config(layers)).eval()


def clip_text_with_projection() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_text_config()).eval()


def t5(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=32,
        d_model=width,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def vae(latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    ).eval()


def unet_sd15(layers_per_block: int = 1) -> UNet2DConditionModel:
    """Return a UNet of SD 1.x: four levels, 1 x 1 convolutions around the attention; by default half of its layers."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=layers_per_block,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def unet_sdxl() -> UNet2DConditionModel:
    """Return a UNet of SDXL: three levels, linear projections around deeper attention, size and crop embeddings."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    ).eval()


def flux_transformer(blocks: int = 2) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()


def sd15(layers_per_block: int = 1) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        unet=unet_sd15(layers_per_block),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        unet=unet_sdxl(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text_with_projection(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_modular() -> "ModularPipeline":
    whole = sdxl()
    pipe = versions.diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in whole.components.items() if part is not None})
    return pipe


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        text_encoder=clip_text_with_projection(),
        text_encoder_2=clip_text_with_projection(),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        vae=vae(shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    pipe = FluxPipeline(
        transformer=flux_transformer(),
        text_encoder=clip_text(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        vae=vae(latent_channels=4, shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_control(**options: int) -> FluxControlPipeline:
    """Return the pipeline for Flux.1 that feeds a control image; options are those of its transformer."""
    pipe = flux()
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    if options:
        parts["transformer"] = FluxTransformer2DModel(**{**pipe.transformer.config, **options}).eval()
    pipe = FluxControlPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd15_full() -> StableDiffusionPipeline:
    """Return a pipeline whose UNet has all layers that the original latent-diffusion UNet has names for."""
    return sd15(layers_per_block=2)


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def draw(pipe: "DiffusionPipeline | ModularPipeline", **options: Any) -> Tensor:
    """Return the latents of one picture, always from the same noise."""
    options = {"prompt": PROMPT, "num_inference_steps": 2, "height": 16, "width": 16, **options}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if not isinstance(pipe, DiffusionPipeline):
            latents: Any = pipe(generator=generator, output="latents", output_type="latent", **options)
            return latents
        return pipe(generator=generator, output_type="latent", **{"guidance_scale": 1.0, **options}).images
