#!/usr/bin/env bash
# A bitsandbytes 4-bit layer with quant_storage=bfloat16 turns to noise under .to(torch.float16),
# without an error.
#
# Expected: casting a quantised model leaves the packed weight alone, as it does with the default
# storage, or raises.
#
# Happens: with a floating quant_storage the packed bytes are held as bfloat16 numbers, and
# .to(torch.float16) converts those numbers. The bytes under them are then others, as many as
# before, so the layer runs on and gives noise: the relative error goes from 0.09 to more than 1.
#
# Versions: torch 2.13.0 (CPU), bitsandbytes 0.50.2; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, bitsandbytes 0.50.2
#     quant_storage torch.uint8: after .to(torch.bfloat16) the packed weight is torch.uint8,
#         relative error of the output 0.093
#     quant_storage torch.uint8: after .to(torch.float16) the packed weight is torch.uint8, relative
#         error of the output 0.093
#     quant_storage torch.bfloat16: after .to(torch.bfloat16) the packed weight is torch.bfloat16,
#         relative error of the output 0.093
#     quant_storage torch.bfloat16: after .to(torch.float16) the packed weight is torch.float16,
#         relative error of the output 1.301
#     holds
#
# Why it matters: quant_storage=torch.bfloat16 is what sharded 4-bit training asks for, and
# model.half() or .to(dtype) in front of inference is common. Adapters trained on the sound base are
# then blamed. A loader should leave such weights out of its casts.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" bitsandbytes==0.50.2 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import copy
import sys
from importlib.metadata import version

import torch
from bitsandbytes.nn import Linear4bit

print(*(f"{n} {version(n)}" for n in ("torch", "bitsandbytes")), sep=", ")
torch.manual_seed(0)
plain = torch.nn.Linear(256, 256)
x = torch.randn(8, 256)
want = plain(x).detach()
seen = {}
for storage in (torch.uint8, torch.bfloat16):
    layer = Linear4bit(256, 256, quant_type="nf4", compute_dtype=torch.float32, quant_storage=storage)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    for cast in (torch.bfloat16, torch.float16):
        other = copy.deepcopy(layer).to(cast)
        got = other(x.to(cast)).detach().float()
        seen[storage, cast] = round(float((got - want).norm() / want.norm()), 3)
        print(f"quant_storage {storage}: after .to({cast}) the packed weight is {other.weight.dtype}, relative error "
              f"of the output {seen[storage, cast]}")
bad = seen.pop((torch.bfloat16, torch.float16))
holds = max(seen.values()) < 0.2 and not bad < 0.8
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
