#!/usr/bin/env bash
# Strength 0 does not switch a DoRA off in PEFT and diffusers: part of its effect stays.
#
# Expected: set_adapters(name, 0.0), or a call with scale 0, gives the base model's output, as for
# any LoRA.
#
# Happens: the strength scales the low-rank part only. The trained magnitudes are still divided by
# the norm of the base weight's rows and applied in full, so with trained magnitudes the output at
# strength 0 is not the base model's. disable_adapters() does give it.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate
# 1.15.0, safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, diffusers 0.42.1, peft 0.21.2
#     LoRA moves the output: {'strength 1': 0.2281, 'a call with scale 0': 0.0, 'set_adapters 0':
#         0.0, 'disable_adapters': 0.0}
#     DoRA moves the output: {'strength 1': 0.271, 'a call with scale 0': 0.0747, 'set_adapters 0':
#         0.0747, 'disable_adapters': 0.0}
#     holds
#
# Why it matters: a strength slider does not end at the base model, and 'strength 0' is no baseline
# for a comparison. What a strength between 0 and 1 means for a DoRA is each library's own choice,
# so only strength 1 can be compared between loaders.

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
inputs = dict(sample=torch.randn(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(1, 7, 32))
seen = {}
for use_dora in (False, True):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()
    with torch.no_grad():
        plain = unet(**inputs).sample
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], use_dora=use_dora), "style")
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
            if "magnitude" in name:
                parameter.mul_(1.3)
        moved = lambda **more: round(float((unet(**inputs, **more).sample - plain).abs().max()), 4)
        row = {"strength 1": moved(), "a call with scale 0": moved(cross_attention_kwargs={"scale": 0.0})}
        unet.set_adapters("style", 0.0)
        row["set_adapters 0"] = moved()
        unet.disable_adapters()
        row["disable_adapters"] = moved()
    seen[use_dora] = row
    print("DoRA" if use_dora else "LoRA", "moves the output:", row)
lora, dora = seen[False], seen[True]
holds = (lora["a call with scale 0"] == lora["set_adapters 0"] == 0 and dora["disable_adapters"] < 1e-4
         and min(dora["a call with scale 0"], dora["set_adapters 0"]) > 0.1 * dora["strength 1"])
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
