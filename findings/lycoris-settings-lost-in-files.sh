#!/usr/bin/env bash
# LyCORIS cannot load its own files of IA3, of DoRA by input, and of LoKr with unbalanced factors.
#
# Expected: create_lycoris_from_weights rebuilds any network that create_lycoris made, from its
# state_dict.
#
# Happens: it guesses the settings from names and shapes. Which axis a DoRA is normed over
# (wd_on_output) and how a LoKr divides the widths (unbalanced_factorization) are not among what it
# guesses, so it builds the default and fails on the shapes; the builder of IA3 takes fewer arguments
# than it is called with.
#
# Versions: torch 2.13.0 (CPU), lycoris-lora 4.1.3; Python 3.11.
#
# Seen on 2026-12-01:
#     torch 2.13.0+cpu, lycoris-lora 4.1.3
#     LoRA: loads
#     DoRA by output: loads
#     LoKr: loads
#     IA3: TypeError
#     DoRA by input: RuntimeError
#     LoKr, unbalanced: RuntimeError
#     holds
#
# Why it matters: all three train and save without complaint, and their files hold everything that is
# needed. A reader has to take the axis and the factors from the shapes, as diffadapt does.

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
from lycoris.wrapper import create_lycoris_from_weights

logging.disable(logging.WARNING)
print(*(f"{n} {version(n)}" for n in ("torch", "lycoris-lora")), sep=", ")
cases = {
    "LoRA": {"algo": "lora"},
    "DoRA by output": {"algo": "lora", "dora_wd": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "IA3": {"algo": "ia3"},
    "DoRA by input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "LoKr, unbalanced": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
}
seen = {}
for name, options in cases.items():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24))
    net = create_lycoris(copy.deepcopy(model), 1.0, linear_dim=4, linear_alpha=4, **options)
    net.apply_to()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        network, _ = create_lycoris_from_weights(1.0, "", copy.deepcopy(model), state)
        seen[name] = "loads" if network.loras else "is ignored"
    except (TypeError, RuntimeError) as error:
        seen[name] = type(error).__name__
    print(f"{name}: {seen[name]}")
holds = list(seen.values()) == ["loads"] * 3 + ["TypeError", "RuntimeError", "RuntimeError"]
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
