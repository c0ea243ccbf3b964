#!/usr/bin/env bash
# A PEFT LoRA in torch's nn.TransformerEncoderLayer works in train() and does nothing in eval().
#
# Expected: with no dropout, eval() gives what train() gives: adapters have no modes.
#
# Happens: in eval() the layer takes torch's fused path, which reads linear1.weight and
# linear2.weight itself and never calls the two modules. The adapter wrapper shows the base layer's
# weight under that name, so the fused path runs and the LoRA is left out. Merged, it counts again.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, safetensors
# 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, peft 0.21.2
#     no dropout anywhere; the LoRA moves the output by 3.7922 in train(), 0.0 in eval(), 0.0 in
#         eval() under no_grad, 3.7922 in eval() once merged
#     holds
#
# Why it matters: the loss falls, the validation is the base model's, and it looks like a failed
# save or load. Anything that wraps or hooks its Linear layers meets the same.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$work/check.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model

print(*(f"{n} {version(n)}" for n in ("torch", "peft")), sep=", ")
torch.manual_seed(0)
base = torch.nn.TransformerEncoder(
    torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False)
x = torch.randn(2, 5, 16)
plain = base.eval()(x).detach()
model = get_peft_model(base, LoraConfig(r=2, target_modules=["linear1", "linear2"]))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=1.0)


def moved():
    return round(float((model.base_model.model(x).detach() - plain).abs().max()), 4)


model.train()
train = moved()
model.eval()
evaluation = moved()
with torch.no_grad():
    without_grad = moved()
model.merge_adapter()
merged = moved()
print(f"no dropout anywhere; the LoRA moves the output by {train} in train(), {evaluation} in eval(), {without_grad} "
      f"in eval() under no_grad, {merged} in eval() once merged")
holds = train > 0.1 and merged > 0.1 and max(evaluation, without_grad) < 0.001
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
