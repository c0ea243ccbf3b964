#!/usr/bin/env bash
# PEFT reads alpha_pattern and rank_pattern in their order, and saves them sorted by name: an
# adapter loads with other scales than it was trained with.
#
# Expected: saving and loading an adapter keeps each layer's alpha and rank.
#
# Happens: the first pattern that fits a layer's name wins, and a plain name fits as the end of a
# longer one. {'up.to_k': 16, 'to_k': 4} gives up.to_k 16 in training, adapter_config.json holds
# 'to_k' first, and after loading up.to_k has 4, with no warning. With rank_pattern the adapter
# can't be loaded at all.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, safetensors
# 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, peft 0.21.2
#     alpha_pattern given:    {"up.to_k": 16, "to_k": 4} -> scalings {'down': 2.0, 'up': 8.0}
#     alpha_pattern on disk:  {"to_k": 4, "up.to_k": 16} -> scalings {'down': 2.0, 'up': 2.0}
#     an adapter saved with rank_pattern {"up.to_k": 4, "to_k": 3} is refused at load for its
#         shapes: True
#     holds
#
# Why it matters: exceptions before the rule is the natural way to write such a mapping. The
# strength of single layers changes between training and use. Full module names as keys keep clear
# of it, and a loader that trusts the order in the file reproduces the wrong scales faithfully.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$work/check.py" <<'PY'
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

print(*(f"{n} {version(n)}" for n in ("torch", "peft")), sep=", ")


def model():
    torch.manual_seed(0)
    block = lambda: torch.nn.ModuleDict({"to_k": torch.nn.Linear(8, 8)})
    return torch.nn.ModuleDict({"down": block(), "up": block()})


def scalings(wrapped):
    inner = wrapped.base_model.model
    return {part: inner[part]["to_k"].scaling["default"] for part in ("down", "up")}


pattern = {"up.to_k": 16, "to_k": 4}
wrapped = get_peft_model(model(), LoraConfig(r=2, lora_alpha=2, target_modules=["to_k"], alpha_pattern=pattern))
trained = scalings(wrapped)
print("alpha_pattern given:   ", json.dumps(pattern), "-> scalings", trained)
with tempfile.TemporaryDirectory() as folder:
    wrapped.save_pretrained(folder)
    saved = json.loads((Path(folder) / "adapter_config.json").read_text())["alpha_pattern"]
    loaded = scalings(PeftModel.from_pretrained(model(), folder))
print("alpha_pattern on disk: ", json.dumps(saved), "-> scalings", loaded)

pattern = {"up.to_k": 4, "to_k": 3}
wrapped = get_peft_model(model(), LoraConfig(r=2, target_modules=["to_k"], rank_pattern=pattern))
with tempfile.TemporaryDirectory() as folder:
    wrapped.save_pretrained(folder)
    try:
        PeftModel.from_pretrained(model(), folder)
        refused = False
    except RuntimeError as error:
        refused = "size mismatch" in str(error)
print("an adapter saved with rank_pattern", json.dumps(pattern), "is refused at load for its shapes:", refused)
holds = trained == {"down": 2.0, "up": 8.0} and loaded == {"down": 2.0, "up": 2.0} and refused
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
