#!/usr/bin/env bash
# Multiplier 0 is the strongest setting of a LyCORIS DoRA: it leaves the whole low-rank change in.
#
# Expected: the multiplier goes from the base model's output at 0 to the trained one at 1, as it
# does for a LoRA.
#
# Happens: with dora_wd the multiplier scales only the step that brings each row back to its trained
# magnitude; the low-rank change is added in full before. At 0 what remains is the base weight plus
# all of that change without any magnitude: the very output of the plain LoRA at full strength, and
# further from the base model than multiplier 1.
#
# Versions: torch 2.13.0 (CPU), lycoris-lora 4.1.3; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, lycoris-lora 4.1.3
#     LoRA moves the output: by 37.099 at multiplier 1.0, by 18.549 at multiplier 0.5, by 0.0 at
#         multiplier 0.0
#     with dora_wd moves the output: by 15.463 at multiplier 1.0, by 25.09 at multiplier 0.5, by
#         37.099 at multiplier 0.0
#     holds
#
# Why it matters: turning a DoRA down turns it up. A multiplier of 0 in a schedule, or
# set_multiplier(0) for a comparison picture, gives a damaged model instead of the base one;
# restore() gives the base. PEFT does the opposite, it keeps the magnitudes and drops the low-rank
# part, so half strength means different things in the two libraries.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" lycoris-lora==4.1.3 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import logging
import sys
from importlib.metadata import version

import torch
from lycoris import create_lycoris

logging.disable(logging.WARNING)
print(*(f"{n} {version(n)}" for n in ("torch", "lycoris-lora")), sep=", ")
torch.manual_seed(0)
x = torch.randn(8, 64)
seen = {}
for dora in (False, True):
    for multiplier in (1.0, 0.5, 0.0):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        plain = model(x).detach()
        net = create_lycoris(model, multiplier, linear_dim=4, linear_alpha=4, algo="lora", dora_wd=dora)
        net.apply_to()
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        seen[dora, multiplier] = round(float((model(x) - plain).norm()), 3)
        net.restore()
        assert torch.equal(model(x), plain)
    print("with dora_wd" if dora else "LoRA", "moves the output:",
          ", ".join(f"by {seen[dora, m]} at multiplier {m}" for m in (1.0, 0.5, 0.0)))
holds = seen[False, 0.0] == 0 and seen[True, 0.0] > 1.5 * seen[True, 1.0] and seen[True, 0.0] == seen[False, 1.0]
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
