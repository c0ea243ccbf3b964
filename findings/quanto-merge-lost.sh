#!/usr/bin/env bash
# Writing in place into a frozen optimum-quanto weight is lost in silence, and so is a LoRA that
# PEFT merges there.
#
# Expected: a quantised weight that can't be written in place raises when one tries, or is
# requantised.
#
# Happens: zero_(), mul_() and += on the weight run without an error on a dequantised copy that is
# thrown away. PEFT treats the layer as a plain linear one and merges with +=: merged_adapters says
# 'default', the output is the base model's, and merge_and_unload() returns a model without the
# LoRA.
#
# Versions: torch 2.13.0 (CPU), optimum-quanto 0.2.7, peft 0.21.2, transformers 5.23.0, accelerate
# 1.15.0, safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, optimum-quanto 0.2.7, peft 0.21.2
#     WeightQBytesTensor: zeroed, multiplied by 0 and raised by 1 in place; output moved by 0.0
#     peft.tuners.lora.layer.Linear: the LoRA moves the output by 0.9494; after merge_adapter(),
#         merged_adapters ['default'], by 0.0
#     after merge_and_unload(): by 0.0
#     holds
#
# Why it matters: fusing before inference removes the adapter and reports success. A loader must
# know this kind of tensor by type, and write a newly quantised weight into the module instead of
# into the tensor.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" optimum-quanto==0.2.7 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig, get_peft_model

print(*(f"{n} {version(n)}" for n in ("torch", "optimum-quanto", "peft")), sep=", ")
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).eval()
x = torch.randn(4, 64)
quantize(base, weights=qint8)
freeze(base)
plain = base(x).detach()
moved = lambda model: round(float((model(x) - plain).abs().max()), 4)

with torch.no_grad():
    base[0].weight.zero_()
    base[0].weight.data.mul_(0.0)
    base[0].weight.data += 1.0
written = moved(base)
print(f"{type(base[0].weight).__name__}: zeroed, multiplied by 0 and raised by 1 in place; output moved by {written}")

model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)
active = moved(model)
model.merge_adapter()
merged = moved(model)
layer = model.base_model.model[0]
print(f"{type(layer).__module__}.{type(layer).__name__}: the LoRA moves the output by {active}; after merge_adapter(), "
      f"merged_adapters {layer.merged_adapters}, by {merged}")
unloaded = moved(model.merge_and_unload())
print(f"after merge_and_unload(): by {unloaded}")
holds = written == 0 and active > 0.1 and merged == 0 and unloaded == 0 and layer.merged_adapters == ["default"]
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
