#!/usr/bin/env bash
# diffusers' group offloading to disk takes the weights of whichever model used the folder first.
#
# Expected: enable_group_offload(offload_to_disk_path=folder) writes the model's weights to that
# folder, over what may lie there.
#
# Happens: a group's file is named after the group's place in the model alone, and it isn't written
# where it exists. A model of the same kind that is offloaded to the same folder later, with a LoRA
# fused in or with altogether other weights, computes with the first model's weights from then on,
# exactly and in silence.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate
# 1.15.0, safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, diffusers 0.42.1, peft 0.21.2
#     the plain model, offloaded to a folder, is off by 0.0
#     the same model with a LoRA fused in: 0.4672 away from the plain one; offloaded to that folder
#         it is 0.4672 away from itself and 0.0 away from the plain one
#     another model: 1.4639 away from the plain one; offloaded to that folder it is 1.4639 away from
#         itself and 0.0 away from the plain one
#     holds
#
# Why it matters: a fixed cache folder is the obvious choice here. With one, fusing a LoRA has no
# effect from the second start of the program on, and two transformers of one pipeline that share
# the folder become one. Each model, and each state of its weights, needs an empty folder of its
# own.

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
import tempfile
from importlib.metadata import version

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

print(*(f"{n} {version(n)}" for n in ("torch", "diffusers", "peft")), sep=", ")
logging.getLogger("diffusers").setLevel(logging.ERROR)
torch.manual_seed(0)
inputs = dict(sample=torch.randn(1, 4, 8, 8), timestep=3, encoder_hidden_states=torch.randn(1, 7, 32))


def pipeline(seed=0):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()
    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


def with_lora_fused():
    pipe = pipeline()
    file = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith((".to_q", ".to_v")):
            file[f"unet.{name}.lora_A.weight"] = torch.randn(4, module.in_features) * 0.3
            file[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 4) * 0.3
    pipe.load_lora_weights(file, adapter_name="style")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


@torch.no_grad()
def run(pipe):
    return pipe.unet(**inputs).sample


def offload(pipe, folder):
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=folder)
    return pipe


gap = lambda one, other: round(float((one - other).abs().max()), 4)
plain = run(pipeline())
seen = {}
with tempfile.TemporaryDirectory() as folder:
    print("the plain model, offloaded to a folder, is off by", gap(run(offload(pipeline(), folder)), plain))
    for label, pipe in (("the same model with a LoRA fused in", with_lora_fused()), ("another model", pipeline(1))):
        before = run(pipe)
        after = run(offload(pipe, folder))
        seen[label] = gap(before, plain), gap(after, before), gap(after, plain)
        print(f"{label}: {seen[label][0]} away from the plain one; offloaded to that folder it is {seen[label][1]} "
              f"away from itself and {seen[label][2]} away from the plain one")
holds = all(own > 0.05 and off > 0.05 and stale < 0.001 for own, off, stale in seen.values())
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
