#!/usr/bin/env bash
# torchao's int8 dynamic quantisation passes no gradient to its input, and adapters below it get
# zeros in silence.
#
# Expected: a frozen quantised layer either passes the gradient on, as int8 weight-only does, or
# raises.
#
# Happens: the layer's output has no path back to its input. A LoRA in the last layer learns; in a
# layer below, what comes back is only what the LoRA above lets through, and that is exactly 0 as
# long as the upper lora_B is at its initial zeros.
#
# Versions: torch 2.13.0 (CPU), torchao 0.18.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0,
# safetensors 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, torchao 0.18.0, peft 0.21.2
#     not quantised: gradient norm of lora_B in the first layer 0.0525, in the second 0.0567
#     Int8WeightOnlyConfig: gradient norm of lora_B in the first layer 0.0524, in the second 0.0567
#     Int8DynamicActivationInt8WeightConfig: gradient norm of lora_B in the first layer 0.0, in the
#         second 0.0566
#     holds
#
# Why it matters: the loss falls, since the last adapted layer learns, so the run looks fine. Each
# adapter is quietly cut off from the loss behind such layers. One must look at the gradients, or
# train on the weight-only form and switch for inference.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" torchao==0.18.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

print(*(f"{n} {version(n)}" for n in ("torch", "torchao", "peft")), sep=", ")
torch.manual_seed(0)
x = torch.randn(8, 64)
seen = {}
for config in (None, Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    if config is not None:
        quantize_(model, config)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"]))
    model(x).pow(2).mean().backward()
    layers = model.base_model.model
    norms = [None if g is None else round(float(g.norm()), 4)
             for g in (layers[i].lora_B["default"].weight.grad for i in (0, 1))]
    label = "not quantised" if config is None else type(config).__name__
    seen[label] = norms
    print(f"{label}: gradient norm of lora_B in the first layer {norms[0]}, in the second {norms[1]}")
cut = seen.pop("Int8DynamicActivationInt8WeightConfig")
holds = not cut[0] and cut[1] > 0.01 and all(min(norms) > 0.01 for norms in seen.values())
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
