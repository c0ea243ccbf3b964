#!/usr/bin/env bash
# PEFT's LoRA, LoHa and LoKr pad with zeros on a convolution whose padding_mode is circular or
# reflect.
#
# Expected: an adapter of a convolution computes what its merged weight computes, so merging changes
# nothing beyond rounding.
#
# Happens: the adapter's own convolution takes over stride and padding but not padding_mode. In the
# picture's inside both agree to 1e-6; in the border the unmerged adapter sees zeros where the base
# layer sees the other side, and merging changes the output by as much as the adapter itself does.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, safetensors
# 0.8.0; Python 3.11.
#
# Seen on 2026-11-30:
#     torch 2.13.0+cpu, peft 0.21.2
#     zeros    LoraConfig merged against unmerged: off by 1.4e-06 at the border, 1.2e-06 inside
#     zeros    LoHaConfig merged against unmerged: off by 3.6e-07 at the border, 3.6e-07 inside
#     zeros    LoKrConfig merged against unmerged: off by 4.8e-07 at the border, 4.8e-07 inside
#     circular LoraConfig merged against unmerged: off by 5.4 at the border, 2.9e-06 inside
#     circular LoHaConfig merged against unmerged: off by 2.4 at the border, 4.8e-07 inside
#     circular LoKrConfig merged against unmerged: off by 3.5 at the border, 9.5e-07 inside
#     reflect  LoraConfig merged against unmerged: off by 7 at the border, 1.4e-06 inside
#     reflect  LoHaConfig merged against unmerged: off by 0.51 at the border, 3.6e-07 inside
#     reflect  LoKrConfig merged against unmerged: off by 4.4 at the border, 1.4e-06 inside
#     holds
#
# Why it matters: padding_mode = 'circular' on each convolution is the usual way to seamless
# textures and panoramas. With an unmerged adapter the seam comes back, and only there; fused, it is
# gone. Which of the two the adapter was trained with is not in its file.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$work/check.py" <<'PY'
import copy
import sys
from importlib.metadata import version

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

print(*(f"{n} {version(n)}" for n in ("torch", "peft")), sep=", ")
torch.manual_seed(0)
x = torch.randn(1, 4, 8, 8)
seen = {}
for mode in ("zeros", "circular", "reflect"):
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode))
    for config in (LoraConfig, LoHaConfig, LoKrConfig):
        model = get_peft_model(copy.deepcopy(base), config(r=2, target_modules=["0"])).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        active = model(x).detach()
        gap = (model.merge_and_unload()(x) - active).abs().amax((0, 1))
        seen[mode, config.__name__] = border, inside = float(gap.max()), float(gap[1:-1, 1:-1].max())
        print(f"{mode:8} {config.__name__:10} merged against unmerged: off by {border:.2g} at the border, "
              f"{inside:.2g} inside")
holds = all((border > 0.05) == (mode != "zeros") and inside < 1e-4 for (mode, _), (border, inside) in seen.items())
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
