#!/usr/bin/env bash
# A LoRA on T5's 'shared' embedding has no effect in transformers 5.23 until it is merged.
#
# Expected: shared is the encoder's token embedding: named_parameters() has no other one. An adapter
# on it changes the prompt's embedding.
#
# Happens: shared and encoder.embed_tokens are two modules around one tensor, and only the second is
# called. PEFT wraps the first: the output doesn't move and needs no gradient. Merging then writes
# into the common tensor, and the effect comes out of nowhere.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, safetensors
# 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, transformers 5.23.0, peft 0.21.2
#     shared is encoder.embed_tokens: False | their weights are one tensor: True | named in
#         named_parameters(): ['shared.weight']
#     LoRA on shared: moves the output by 0.0, its output needs a gradient: False; once merged it
#         moves the output by 2.2285
#     LoRA on embed_tokens: moves the output by 2.2285, its output needs a gradient: True; once
#         merged it moves the output by 2.2285
#     holds
#
# Why it matters: 'shared' is the only name that named_parameters() shows for the embedding, so it
# is the one to be picked as a target in the T5 text encoder of an image pipeline. Beside other
# targets the loss falls without it and nobody notices; the merged model then does what no sample
# has shown before. embed_tokens is the name to target.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$work/check.py" <<'PY'
import logging
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5EncoderModel

print(*(f"{n} {version(n)}" for n in ("torch", "transformers", "peft")), sep=", ")
tokens = torch.arange(10)[None]


def encoder():
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=100)).eval()


plain = encoder()
reference = plain(tokens)[0].detach()
print("shared is encoder.embed_tokens:", plain.shared is plain.encoder.embed_tokens,
      "| their weights are one tensor:", plain.shared.weight is plain.encoder.embed_tokens.weight,
      "| named in named_parameters():", [n for n, _ in plain.named_parameters() if "shared" in n or "embed" in n])
seen = {}
for target in ("shared", "embed_tokens"):
    model = get_peft_model(encoder(), LoraConfig(r=2, target_modules=[target]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    output = model(input_ids=tokens)[0]
    active = round(float((output - reference).abs().max()), 4)
    merged = round(float((model.merge_and_unload()(tokens)[0] - reference).abs().max()), 4)
    seen[target] = active, output.requires_grad, merged
    print(f"LoRA on {target}: moves the output by {active}, its output needs a gradient: {output.requires_grad}; "
          f"once merged it moves the output by {merged}")
active, needs_gradient, merged = seen["shared"]
holds = active < 0.001 and not needs_gradient and merged > 0.1 and seen["embed_tokens"][0] > 0.1
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
