"""The models of the embedded pipeline: classes of diffusers and transformers, in miniature.

A CLIP tokenizer and text encoder (0.15 M parameters), a UNet (4.2 M) over 16 x 16 x 4 latents and a VAE (0.95 M) make
64 x 64 pictures. In half precision they take 11 MB together.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tiny_world import SIZE, vocabulary
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_FACTOR = 4
Model = TypeVar("Model", bound=nn.Module)


def build_tokenizer() -> CLIPTokenizer:
    """Return CLIP's byte-level BPE tokenizer with just the merges that make every word of the world one token."""
    merges: dict[tuple[str, str], None] = {}
    for word in vocabulary():
        parts = _split(word, list(merges))
        while len(parts) > 1:  # the merge added last has the lowest priority, so it never breaks an earlier word
            merges[parts[0], parts[1]] = None
            parts[:2] = [parts[0] + parts[1]]
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbered = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=numbered, merges=list(merges), model_max_length=77)


def write_vocabulary(folder: Path) -> None:
    """Write the vocabulary and the merges of the tokenizer in `folder`, which transformers 4 reads, next to it."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _byte_symbols() -> list[str]:
    """Return the symbols of byte-level BPE for all bytes: printable ones stand for themselves, others start at 256."""
    spans = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [chr(code) for first, last in spans for code in range(ord(first), ord(last) + 1)]
    return printable + [chr(256 + number) for number in range(256 - len(printable))]


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Return the tokens of a word by the rule of BPE: merges are applied in their order."""
    parts = [*word[:-1], word[-1] + "</w>"]
    for merge in merges:
        for place in range(len(parts) - 2, -1, -1):
            if tuple(parts[place : place + 2]) == merge:
                parts[place : place + 2] = ["".join(merge)]
    return parts


def build_vae() -> AutoencoderKL:
    """Return the untrained VAE."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """Return the untrained UNet."""
    return UNet2DConditionModel(
        sample_size=SIZE // LATENT_FACTOR,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=2,  # diffusers' name for the number of heads
        cross_attention_dim=64,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the untrained text encoder for a tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDIMScheduler:
    """Return the scheduler. With linear betas and trailing spacing, sampling starts from almost pure noise, as the last
    training timestep does.
    """
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def seeded(build: Callable[[], Model], seed: int) -> Model:
    """Build a model from a seed and leave the global generator, which module constructors use, as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
