#!/usr/bin/env bash
# One diffusers call with {"scale": 0.0} sets every LoRA strength to 1.0 for the calls that follow.
#
# Expected: cross_attention_kwargs={"scale": s} holds for one call; afterwards the strength chosen
# with set_adapters is back, for s = 0 as for s = 0.01.
#
# Happens: a scale that isn't 0 is divided out again after the call. For 0, which can't be divided
# out, the strength of the active adapters is set to 1.0 instead of to what it was: after
# set_adapters('style', 0.3) the LoRA is more than three times as strong once someone has called
# with scale 0. Nothing is logged.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate
# 1.15.0, safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, diffusers 0.42.1, peft 0.21.2
#     set_adapters 0.3, one call with scale 0.01, then a plain call: output moved by 0.0, scaling is
#         now 0.3
#     set_adapters 0.3, one call with scale 0.0, then a plain call: output moved by 0.104, scaling
#         is now 1.0
#     holds
#
# Why it matters: calling with scale 0 is how one makes the picture without the LoRA for comparison.
# Every picture after it has another strength than before. Use disable_lora() and enable_lora(), or
# set the strengths again after such a call.

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
from diffusers import UNet2DConditionModel
from peft import LoraConfig

print(*(f"{n} {version(n)}" for n in ("torch", "diffusers", "peft")), sep=", ")
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=8,
    norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]), "style")
for name, parameter in unet.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.3)
inputs = dict(sample=torch.randn(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(1, 7, 32))
layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q


@torch.no_grad()
def run(scale=None):
    more = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    return unet(**inputs, **more).sample


seen = {}
for scale in (0.01, 0.0):
    unet.set_adapters("style", 0.3)
    before = run()
    run(scale)
    after = run()
    seen[scale] = round(float((after - before).abs().max()), 3), round(layer.scaling["style"], 6)
    print(f"set_adapters 0.3, one call with scale {scale}, then a plain call: "
          f"output moved by {seen[scale][0]}, scaling is now {seen[scale][1]}")
holds = seen[0.01] == (0.0, 0.3) and seen[0.0][0] > 0.1 and seen[0.0][1] == 1.0
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
