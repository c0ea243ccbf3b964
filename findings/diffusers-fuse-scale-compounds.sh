#!/usr/bin/env bash
# fuse_lora(lora_scale=0.5) of diffusers stays in force after unfuse_lora(), so a second fusing
# takes a quarter.
#
# Expected: lora_scale is an argument of one fusing. After unfuse_lora() the pipeline is as before,
# and fusing again with 0.5 puts in half of the LoRA again.
#
# Happens: the LoRA layer's own scaling is multiplied by lora_scale and never set back. Unfused, the
# LoRA works at 0.5 from then on; the second fuse_lora(lora_scale=0.5) puts in 0.25, the third
# 0.125, and fuse_lora() without a scale 0.125, too.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate
# 1.15.0, safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, diffusers 0.42.1, peft 0.21.2
#     fuse_lora(lora_scale=0.5) put in 0.5 of the LoRA; after unfuse_lora() its own scaling is 0.5
#     fuse_lora(lora_scale=0.5) put in 0.25 of the LoRA; after unfuse_lora() its own scaling is 0.25
#     fuse_lora(lora_scale=0.5) put in 0.125 of the LoRA; after unfuse_lora() its own scaling is
#         0.125
#     fuse_lora() with no scale put in 0.125
#     holds
#
# Why it matters: a tool that tries strengths by fusing and unfusing measures something else from
# its second try on. The remedy is set_adapters(name, 1.0) between two fusings, and a loader that
# takes over a pipeline must read each layer's scaling instead of supposing alpha / r.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$work/check.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

print(*(f"{n} {version(n)}" for n in ("torch", "diffusers", "peft")), sep=", ")
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=8,
    norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
pipe = StableDiffusionPipeline(
    vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False)
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]), "style")
for name, parameter in unet.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)
layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
base, delta = layer.base_layer.weight.detach().clone(), layer.get_delta_weight("style").detach()


def fused_strength():
    difference = layer.base_layer.weight.detach() - base
    return round(float((difference * delta).sum() / (delta * delta).sum()), 4)


seen = []
for _ in range(3):
    pipe.fuse_lora(lora_scale=0.5)
    fused = fused_strength()
    pipe.unfuse_lora()
    seen.append((fused, layer.scaling["style"]))
    print(f"fuse_lora(lora_scale=0.5) put in {fused} of the LoRA; after unfuse_lora() its own scaling is "
          f"{layer.scaling['style']}")
pipe.fuse_lora()
last = fused_strength()
print(f"fuse_lora() with no scale put in {last}")
holds = seen == [(0.5, 0.5), (0.25, 0.25), (0.125, 0.125)] and last == 0.125
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
