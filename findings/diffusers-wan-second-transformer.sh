#!/usr/bin/env bash
# diffusers never reads a Wan LoRA file's transformer_2.* tensors, not even with
# load_into_transformer_2=True.
#
# Expected: a file that names both of Wan 2.2's transformers, transformer.* and transformer_2.*,
# fills both, or one gets at least a warning; and load_into_transformer_2=True takes the tensors
# named transformer_2.*.
#
# Happens: the plain call fills the first transformer and drops the other tensors without a word.
# load_into_transformer_2=True puts the tensors of the FIRST transformer into the second one, again
# without a word.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate
# 1.15.0, safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, diffusers 0.42.1, peft 0.21.2
#     the file: all ones for transformer.*, all twos for transformer_2.*
#     load_lora_weights(file, {}): transformer got 1.0, transformer_2 got None, warnings about it: 0
#     load_lora_weights(file, {'load_into_transformer_2': True}): transformer got None,
#         transformer_2 got 1.0, warnings about it: 0
#     holds
#
# Why it matters: the high-noise and the low-noise expert get different weights in training. Whoever
# saves both in one file, with the prefixes that the pipeline's own components have, gets a pipeline
# with one adapted expert, or an expert with the other's weights. Two files, each with the prefix
# transformer., are the way that works.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$work/check.py" <<'PY'
import logging
import sys
from importlib.metadata import version

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

print(*(f"{n} {version(n)}" for n in ("torch", "diffusers", "peft")), sep=", ")


class Lines(logging.Handler):
    said = []

    def emit(self, record):
        Lines.said.append(record.getMessage())


logging.getLogger("diffusers").addHandler(Lines(logging.WARNING))


def transformer():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32)


def pipeline():
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(), transformer=transformer(),
        transformer_2=transformer(), boundary_ratio=0.9)


file = {}
for part, value in (("transformer", 1.0), ("transformer_2", 2.0)):
    file[f"{part}.blocks.0.attn1.to_q.lora_A.weight"] = torch.full((2, 24), value)
    file[f"{part}.blocks.0.attn1.to_q.lora_B.weight"] = torch.full((24, 2), value)


def received(model):
    layer = model.blocks[0].attn1.to_q
    return layer.lora_A["both"].weight[0, 0].item() if hasattr(layer, "lora_A") else None


print("the file: all ones for transformer.*, all twos for transformer_2.*")
seen = []
for keywords in ({}, {"load_into_transformer_2": True}):
    pipe = pipeline()
    Lines.said.clear()
    pipe.load_lora_weights(dict(file), adapter_name="both", **keywords)
    about = [line for line in Lines.said if "transformer_2" in line or "nexpected" in line]
    seen.append((received(pipe.transformer), received(pipe.transformer_2), len(about)))
    print(f"load_lora_weights(file, {keywords}): transformer got {seen[-1][0]}, transformer_2 got {seen[-1][1]}, "
          f"warnings about it: {seen[-1][2]}")
holds = seen == [(1.0, None, 0), (None, 1.0, 0)]
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
