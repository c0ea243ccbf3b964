#!/usr/bin/env bash
# Reading state_dict() of a bitsandbytes 4-bit model changes what it computes, without an error, on
# a CPU with AVX512-BF16 after the first call.
#
# Expected: state_dict() only reads. Saving a model, or looking into it, leaves its outputs alone.
#
# Happens: at its first call in inference a Linear4bit packs its weight anew for the CPU's kernels,
# with the scales transposed. state_dict() undoes the packing in the layer itself, but puts the
# scales back in the transposed order unless they are nested (compress_statistics=True). The blocks
# of the weight then have one another's scales: the outputs are off by two fifths here, and stay so.
#
# Versions: torch 2.13.0 (CPU), bitsandbytes 0.50.2; Python 3.11. On a CPU without AVX512-BF16
# nothing is packed anew; the script says so and exits with 2.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, bitsandbytes 0.50.2
#     scales not nested: state_dict() changes the output by 0.443
#     scales nested: state_dict() changes the output by 0.003
#     holds
#
# Why it matters: diffusers' load_lora_adapter and save_pretrained read the state dict of the model.
# A LoRA that is loaded after the first picture is blamed for what happened to the base model. Keep
# adapters and saving away from state_dict() of such a model, or nest the scales.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" bitsandbytes==0.50.2 numpy==2.4.6

cat > "$work/check.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from bitsandbytes.nn import Linear4bit

print(*(f"{n} {version(n)}" for n in ("torch", "bitsandbytes")), sep=", ")
torch.manual_seed(0)
plain = torch.nn.Linear(128, 64, bias=False)
# As in trained models, rows have different sizes.
plain.weight.data *= torch.linspace(0.2, 2, 64).unsqueeze(1)
x = torch.randn(8, 128)
seen = {}
for nested in (False, True):
    layer = Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=nested)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        before = layer(x)
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            print("this CPU has no AVX512-BF16, so nothing is packed anew")
            sys.exit(2)
        layer.state_dict()
        after = layer(x)
    seen[nested] = float((after - before).norm() / before.norm())
    print(f"scales {'nested' if nested else 'not nested'}: state_dict() changes the output by {seen[nested]:.3f}")
holds = seen[False] > 0.1 and seen[True] < 0.02
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
