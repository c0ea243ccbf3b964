#!/usr/bin/env bash
# PEFT's HRA with apply_GS=True starts far from the base model, or with NaN.
#
# Expected: apply_GS makes the reflections orthogonal. With the default initialisation, which promises
# an untouched model for an even rank, the adapter starts without an effect, as it does without it.
#
# Happens: the initialisation makes the reflections equal in pairs, so that each pair cancels. The
# Gram-Schmidt process subtracts the first of a pair from the second; what remains is rounding error,
# which is then normalised into a reflection of its own, or divided by zero. Which of the two, and how
# far off the start is, depends on rounding and so on the dtype and the machine.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0; Python 3.11.
#
# Seen on 2026-12-01:
#     torch 2.13.0+cpu, peft 0.21.2
#     apply_GS=False: six untrained adapters change the output by 0.00, 0.00, 0.00, 0.00, 0.00,
#         0.00 of it
#     apply_GS=True: six untrained adapters change the output by 1.13, nan, 0.67, 0.75, 0.67,
#         1.00 of it
#     holds
#
# Why it matters: training begins with a damaged model and without any message, or ends in NaN. With an
# odd rank PEFT warns that the start is not the base model; here it does not.

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
from peft import HRAConfig, get_peft_model

torch.set_grad_enabled(False)
print(*(f"{n} {version(n)}" for n in ("torch", "peft")), sep=", ")
worst = {}
for gram_schmidt in (False, True):
    changes = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        x = torch.randn(5, 64)
        plain = model(x)
        config = HRAConfig(target_modules=["0"], r=8, apply_GS=gram_schmidt)
        tuned = get_peft_model(copy.deepcopy(model), config).eval()
        changes.append(float((tuned(x) - plain).norm() / plain.norm()))
    worst[gram_schmidt] = changes
    shown = ", ".join(f"{change:.2f}" for change in changes)
    print(f"apply_GS={gram_schmidt}: six untrained adapters change the output by {shown} of it")
holds = max(worst[False]) < 1e-5 and all(not change < 0.1 for change in worst[True])
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
