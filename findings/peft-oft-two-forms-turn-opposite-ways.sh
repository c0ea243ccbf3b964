#!/usr/bin/env bash
# PEFT's two forms of OFT turn the weight in opposite directions for the same tensors.
#
# Expected: use_cayley_neumann chooses between an exact and a fast approximate way to compute the
# same rotation, so the results differ by little.
#
# Happens: the fast form is a series for (I + Q)(I - Q)^-1, the exact one solves for (I - Q)(I +
# Q)^-1, which is its inverse. With small values the two changes of the weight are each other's
# negative.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, safetensors
# 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, peft 0.21.2
#     OFTConfig().use_cayley_neumann is True
#     use_cayley_neumann=True: oft_R.weight begins [-0.01526, -0.0075, -0.00654]
#     use_cayley_neumann=False: oft_R.weight begins [-0.01526, -0.0075, -0.00654]
#     both change the weight by 0.0502 of its norm; the cosine between the two changes is -0.9976;
#         what is left of their sum is 0.0691 of one
#     holds
#
# Why it matters: the tensors alone don't say which rotation was trained. A converter or loader that
# reads oft_R and uses the textbook Cayley form on a file of the default setting undoes what was
# learned, and switching the flag on an adapter to 'be more exact' does so, too.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$work/check.py" <<'PY'
import copy
import sys
from importlib.metadata import version

import torch
from peft import OFTConfig, get_peft_model

print(*(f"{n} {version(n)}" for n in ("torch", "peft")), sep=", ")
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
weight = base[0].weight.detach()
print("OFTConfig().use_cayley_neumann is", OFTConfig().use_cayley_neumann)
turned = {}
for neumann in (True, False):
    model = get_peft_model(copy.deepcopy(base), OFTConfig(
        oft_block_size=8, target_modules=["0"], use_cayley_neumann=neumann))
    torch.manual_seed(1)
    rotation = model.base_model.model[0].oft_R["default"]
    torch.nn.init.normal_(rotation.weight, std=0.01)
    print(f"use_cayley_neumann={neumann}: oft_R.weight begins", [round(v, 5) for v in rotation.weight[0, :3].tolist()])
    turned[neumann] = model.merge_and_unload()[0].weight.detach()
first, second = turned[True] - weight, turned[False] - weight
cosine = round(float(torch.cosine_similarity(first.flatten(), second.flatten(), 0)), 4)
size = round(float(first.norm() / weight.norm()), 4)
left = round(float((first + second).norm() / first.norm()), 4)
print(f"both change the weight by {size} of its norm; the cosine between the two changes is {cosine}; "
      f"what is left of their sum is {left} of one")
holds = OFTConfig().use_cayley_neumann and cosine < -0.99 and size > 0.01
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
