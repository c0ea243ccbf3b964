#!/usr/bin/env bash
# LyCORIS's OFT means another function in bypass mode: there the rotation turns the bias, too.
#
# Expected: bypass_mode is another way to compute the same layer. What was trained with it can be
# merged, and gives the same output when its file is loaded without it.
#
# Happens: the normal mode turns the weight and adds the bias untouched; bypass mode turns the finished
# output, in which the bias is already contained. On layers with a bias the two differ, and merging is
# always the former.
#
# Versions: torch 2.13.0 (CPU), lycoris-lora 4.1.3; Python 3.11.
#
# Seen on 2026-12-01:
#     torch 2.13.0+cpu, lycoris-lora 4.1.3
#     without bias, distance to the normal mode over the adapter's effect: bypass 0.00, merged
#         0.00
#     with bias, distance to the normal mode over the adapter's effect: bypass 0.26, merged 0.00
#     holds
#
# Why it matters: bypass mode is what LyCORIS chooses by itself on a quantised base. An adapter trained
# there is another one when it is merged, or loaded onto the full model. Of Stable Diffusion's layers,
# the output projections of attention, the feed-forward layers and all convolutions have a bias.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" lycoris-lora==4.1.3 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import copy
import logging
import sys
from importlib.metadata import version

import torch
from lycoris import create_lycoris

logging.disable(logging.WARNING)
torch.set_grad_enabled(False)
print(*(f"{n} {version(n)}" for n in ("torch", "lycoris-lora")), sep=", ")
x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
seen = {}
for bias in (False, True):
    outputs = {}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=bias))
    plain = model(x)
    blocks = None
    for mode in ("normal", "bypass", "merged"):
        layer = copy.deepcopy(model)
        net = create_lycoris(layer, 1.0, linear_dim=4, algo="diag-oft", bypass_mode=mode == "bypass")
        net.apply_to()
        net.eval()
        for name, parameter in net.named_parameters():
            if "oft_blocks" in name:
                blocks = 0.3 * torch.randn(parameter.shape) if blocks is None else blocks
                parameter.data.copy_(blocks)
        if mode == "merged":
            net.restore()
            net.merge_to(1.0)
        outputs[mode] = layer(x).detach()
    effect = float((outputs["normal"] - plain).norm())
    seen[bias] = {mode: float((outputs[mode] - outputs["normal"]).norm()) / effect for mode in ("bypass", "merged")}
    shown = ", ".join(f"{mode} {share:.2f}" for mode, share in seen[bias].items())
    print(f"{'with' if bias else 'without'} bias, distance to the normal mode over the adapter's effect: {shown}")
holds = max(*seen[False].values(), seen[True]["merged"]) < 1e-4 and seen[True]["bypass"] > 0.1
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
