#!/usr/bin/env bash
# A fresh PEFT OFT adapter on a 3 x 3 convolution replaces the layer by noise, although its rotation is the identity.
#
# Expected: OFT starts as the identity, so a new adapter changes nothing, as on a linear layer and on a
# 1 x 1 convolution.
#
# Happens: on every larger kernel the forward pass cuts the input into patches, turns them, and puts
# them together again, where each pixel becomes the sum of all patches that hold it. The layer then
# convolves this sum, so even the identity changes its output by a multiple of it. Merging the same
# adapter gives what the formula says: no change.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0; Python 3.11.
#
# Seen on 2026-12-01:
#     torch 2.13.0+cpu, peft 0.21.2
#     kernel 1: an untrained adapter changes the output by 0.00 of it, merged by 0.00
#     kernel 3: an untrained adapter changes the output by 3.18 of it, merged by 0.00
#     kernel 5: an untrained adapter changes the output by 2.80 of it, merged by 0.00
#     holds
#
# Why it matters: training starts from a damaged model and learns to repair it, and the adapter then
# does something else wherever it is merged or read by another program. Linear layers are not affected.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" peft==0.21.2 transformers==5.23.0 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import copy
import sys
from importlib.metadata import version

import torch
from peft import OFTConfig, get_peft_model

torch.set_grad_enabled(False)
print(*(f"{n} {version(n)}" for n in ("torch", "peft")), sep=", ")
x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
seen = {}
for kernel in (1, 3, 5):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 24, kernel, padding=kernel // 2))
    plain = model(x)
    tuned = get_peft_model(copy.deepcopy(model), OFTConfig(target_modules=["0"], r=0, oft_block_size=8)).eval()
    fresh = float((tuned(x) - plain).norm() / plain.norm())
    tuned.merge_adapter()
    merged = float((tuned(x) - plain).norm() / plain.norm())
    seen[kernel] = fresh, merged
    print(f"kernel {kernel}: an untrained adapter changes the output by {fresh:.2f} of it, merged by {merged:.2f}")
holds = seen[1][0] < 1e-5 and min(seen[3][0], seen[5][0]) > 1 and all(merged < 1e-5 for _, merged in seen.values())
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
