#!/usr/bin/env bash
# PEFT's layers_to_transform takes ff.net.0 for block 0 on a diffusers transformer, and finds no
# attention at all.
#
# Expected: layers_to_transform=[0] adapts the targets in transformer_blocks.0, and [1] those in
# transformer_blocks.1.
#
# Happens: with no layers_pattern, the index is the last number in a module's name that has two more
# parts before it. In transformer_blocks.1.ff.net.0.proj that is net.0, so [0] adapts this layer in
# EVERY block; in transformer_blocks.1.attn.to_q no number has two parts before it, so attention is
# never adapted, and [1] finds nothing and raises.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, accelerate
# 1.15.0, safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, diffusers 0.42.1, peft 0.21.2
#     target_modules attn.to_q and ff.net.0.proj; the model has transformer_blocks.0 to .2
#     layers_to_transform=[0] adapts: ['transformer_blocks.0.ff.net.0.proj',
#         'transformer_blocks.1.ff.net.0.proj', 'transformer_blocks.2.ff.net.0.proj']
#     layers_to_transform=[1] adapts: NoMatchingPeftModuleError
#     holds
#
# Why it matters: 'train block 0 only' trains the first feed-forward layer of all blocks, with no
# warning, and a trainer that reports the number of blocks instead of the layers' names hides it.
# With layers_pattern='transformer_blocks' the choice is the expected one.

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

from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.utils.error import NoMatchingPeftModuleError

print(*(f"{n} {version(n)}" for n in ("torch", "diffusers", "peft")), sep=", ")


def chosen(layers):
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8))
    config = LoraConfig(r=2, target_modules=["attn.to_q", "ff.net.0.proj"], layers_to_transform=layers)
    try:
        model.add_adapter(config)
    except NoMatchingPeftModuleError:
        return "NoMatchingPeftModuleError"
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


print("target_modules attn.to_q and ff.net.0.proj; the model has transformer_blocks.0 to .2")
seen = [chosen([0]), chosen([1])]
for index, names in enumerate(seen):
    print(f"layers_to_transform=[{index}] adapts: {names}")
holds = seen == [[f"transformer_blocks.{i}.ff.net.0.proj" for i in range(3)], "NoMatchingPeftModuleError"]
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
