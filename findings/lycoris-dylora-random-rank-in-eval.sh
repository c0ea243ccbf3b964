#!/usr/bin/env bash
# A DyLoRA network of LyCORIS picks a rank at random at each call in eval(), and merge_to() picks
# one, too.
#
# Expected: the rank is drawn at random in training only; eval() and a merge use the whole rank, and
# one input gives one output.
#
# Happens: each forward draws a rank, whatever the mode. Of a network of 16 in blocks of 4 the same
# input has four outputs, and merge_to(1.0) bakes in one of four different models. The smallest rank
# is also the strongest, since the scale is alpha / (number of blocks drawn) rather than alpha /
# rank.
#
# Versions: torch 2.13.0 (CPU), lycoris-lora 4.1.3; Python 3.11.
#
# Seen on 2026-11-30:
#     (not run yet)
#
# Why it matters: validation pictures differ from call to call with the seeds fixed, two merges of
# one file differ, and the numbers of a comparison depend on the draws. A test of a DyLoRA loader
# can't take the live network as its reference.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0)
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
x = torch.randn(4, 64)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()


plain = model()(x).detach()
one = model()
net = create_lycoris(one, 1.0, linear_dim=16, linear_alpha=16, block_size=4, algo="dylora")
net.apply_to()
torch.manual_seed(1)
for parameter in net.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
net.eval()
runs = {round(float((one(x) - plain).norm()), 3) for _ in range(60)}
print(f"eval(), one input, 60 calls: {len(runs)} different outputs, moved by {sorted(runs)}")

merges = set()
for _ in range(60):
    other = model()
    copy = create_lycoris(other, 1.0, linear_dim=16, linear_alpha=16, block_size=4, algo="dylora")
    copy.apply_to()
    torch.nn.Module.load_state_dict(copy.loras[0].up_list, net.loras[0].up_list.state_dict())
    torch.nn.Module.load_state_dict(copy.loras[0].down_list, net.loras[0].down_list.state_dict())
    copy.restore()
    copy.merge_to(1.0)
    merges.add(round(float((other(x) - plain).norm()), 3))
print(f"merge_to(1.0), 60 times from the same weights: {len(merges)} different results, moved by {sorted(merges)}")

holds = len(runs) == 4 and len(merges) == 4
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
