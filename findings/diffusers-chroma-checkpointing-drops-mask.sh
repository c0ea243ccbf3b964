#!/usr/bin/env bash
# Gradient checkpointing changes the output of diffusers' Chroma transformer: half of the blocks lose
# their attention mask.
#
# Expected: enable_gradient_checkpointing() trades time for memory. The output and the gradients are
# those without it.
#
# Happens: ChromaTransformer2DModel.forward passes attention_mask to its double-stream blocks, but
# leaves it out of the checkpointed call of its single-stream blocks. There, the picture attends to
# the padding of the caption, in training only: without autograd, the mask is used again.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, transformers 5.23.0, accelerate 1.15.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, diffusers 0.42.1
#     largest change of the output by checkpointing, relative: 0.000 without padding, 0.014
#         with it
#     largest change of a gradient by checkpointing, relative: 0.411 with padding
#     holds
#
# Why it matters: Chroma pads captions to 512 tokens, and checkpointing is how people train it. The
# adapter is fitted to a model that nobody draws with, and no message says so. Checkpointing the blocks
# from outside, around their forward, keeps every argument.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0

cat > "$work/check.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from diffusers import ChromaTransformer2DModel

print(*(f"{n} {version(n)}" for n in ("torch", "diffusers")), sep=", ")
torch.manual_seed(0)
model = ChromaTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
    joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
    approximator_hidden_dim=32, approximator_layers=1)
text, picture = 8, 16
ids = torch.zeros(picture, 3)
ids[:, 1], ids[:, 2] = torch.arange(picture) // 4, torch.arange(picture) % 4
inputs = {
    "hidden_states": torch.randn(1, picture, 16), "encoder_hidden_states": torch.randn(1, text, 32),
    "timestep": torch.tensor([0.5]), "img_ids": ids, "txt_ids": torch.zeros(text, 3)}


def run(real_tokens, checkpointing):
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    mask = torch.ones(1, text + picture, dtype=torch.bool)
    mask[:, real_tokens:text] = False
    model.zero_grad()
    output = model(**inputs, attention_mask=mask, return_dict=False)[0]
    output.square().mean().backward()
    return output.detach(), model.single_transformer_blocks[0].attn.to_q.weight.grad.clone()


def change(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


found = {real: [change(a, b) for a, b in zip(run(real, True), run(real, False))] for real in (text, 3)}
print(f"largest change of the output by checkpointing, relative: {found[text][0]:.3f} without padding, "
      f"{found[3][0]:.3f} with it")
print(f"largest change of a gradient by checkpointing, relative: {found[3][1]:.3f} with padding")
holds = max(found[text]) < 1e-6 and found[3][0] > 0.005 and found[3][1] > 0.05
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
