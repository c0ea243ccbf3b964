#!/usr/bin/env bash
# LyCORIS merges LoHa and LoKr with alpha / dim applied twice, so the merged model is weaker than
# what was trained.
#
# Expected: merge_to(1.0) leaves a model that gives what the applied network gave.
#
# Happens: so it is for LoRA and GLoRA. For LoHa and LoKr the difference of weights is already
# scaled by alpha / dim when merge_to scales it once more: with dim 8 and alpha 2 the merged effect
# is exactly a quarter of the trained one.
#
# Versions: torch 2.13.0 (CPU), lycoris-lora 4.1.3; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, lycoris-lora 4.1.3
#     lora, dim 8, alpha 2: the merged effect is 1.0 of the effect that was trained
#     loha, dim 8, alpha 2: the merged effect is 0.25 of the effect that was trained
#     lokr, dim 8, alpha 2: the merged effect is 0.25 of the effect that was trained
#     glora, dim 8, alpha 2: the merged effect is 1.0 of the effect that was trained
#     holds
#
# Why it matters: with the usual alpha of 1 a LoHa or LoKr network nearly vanishes when it is
# merged, and the merged checkpoint then looks like failed training. The same file applied is right,
# so whoever compares another loader's merge with LyCORIS's own merge finds it 'too strong'.

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
x = torch.randn(8, 256)
seen = {}
for algo, more in (("lora", {}), ("loha", {}), ("lokr", {"factor": 4}), ("glora", {})):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    plain = model(x).detach()
    net = create_lycoris(model, 1.0, linear_dim=8, linear_alpha=2, algo=algo, **more)
    net.apply_to()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    active = float((model(x) - plain).norm())
    net.restore()
    net.merge_to(1.0)
    seen[algo] = round(float((model(x) - plain).norm()) / active, 4)
    print(f"{algo}, dim 8, alpha 2: the merged effect is {seen[algo]} of the effect that was trained")
holds = seen == {"lora": 1.0, "loha": 0.25, "lokr": 0.25, "glora": 1.0}
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
