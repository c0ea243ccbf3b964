#!/usr/bin/env bash
# PEFT's WaveFT has filters for coif4 and coif5 that belong to no wavelet: a transform with them cannot be undone.
#
# Expected: wavelet_family="coif4" and "coif5" mean the coiflets of these names, with 24 and 30 elements, as in
# PyWavelets. The filters of an orthogonal wavelet have norm 1 and are orthogonal to their shifts by two, so that a
# decomposition followed by a reconstruction returns the matrix.
#
# Happens: PEFT's table of numbers is that of PyWavelets for coif1 to coif3. The filter of coif4 has norm^2 1.01 and
# other elements, and the one of coif5 has 48 elements and norm^2 1.017.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, PyWavelets 1.9.0; Python 3.11.
#
# Seen on 2026-12-01:
#     torch 2.13.0+cpu, peft 0.21.2, pywavelets 1.9.0
#     db8: 16 elements (PyWavelets: 16), norm^2 1.0000, largest product with a shift 0.0000, there and back 0.0000 off
#     sym8: 16 elements (PyWavelets: 16), norm^2 1.0000, largest product with a shift 0.0000, there and back 0.0000 off
#     coif1: 6 elements (PyWavelets: 6), norm^2 1.0000, largest product with a shift 0.0000, there and back 0.0000 off
#     coif2: 12 elements (PyWavelets: 12), norm^2 1.0000, largest product with a shift 0.0000, there and back 0.0000 off
#     coif3: 18 elements (PyWavelets: 18), norm^2 1.0000, largest product with a shift 0.0000, there and back 0.0000 off
#     coif4: 24 elements (PyWavelets: 24), norm^2 1.0099, largest product with a shift 0.0213, there and back 0.0504 off
#     coif5: 48 elements (PyWavelets: 30), norm^2 1.0166, largest product with a shift 0.0070, there and back 0.0389 off
#     holds
#
# Why it matters: an adapter trained with "coif4" or "coif5" has a basis that no other program has under this name, and
# whose directions are neither of length 1 nor orthogonal, which the method (and its learning rate) builds on.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0)
"${pip[@]}"
"${pip[@]}" peft==0.21.2 transformers==5.23.0 numpy==2.4.6 pywavelets==1.9.0

cat > "$work/check.py" <<'PY'
import sys
from importlib.metadata import version

import numpy as np
import pywt
from peft.tuners.waveft.wavelet import Wavelet

print(*(f"{n} {version(n)}" for n in ("torch", "peft", "pywavelets")), sep=", ")
matrix = np.random.default_rng(0).standard_normal((64, 64))
good, bad = [], []
for name in ("db8", "sym8", "coif1", "coif2", "coif3", "coif4", "coif5"):
    found, real = Wavelet(name), pywt.Wavelet(name)
    low = np.array(found.rec_lo)
    shifted = max(abs(float(low[2 * n :] @ low[: len(low) - 2 * n])) for n in range(1, len(low) // 2))
    bank = pywt.Wavelet("own", filter_bank=[found.dec_lo, found.dec_hi, found.rec_lo, found.rec_hi])
    again = pywt.idwt2(pywt.dwt2(matrix, bank, "periodization"), bank, "periodization")
    error = float(np.linalg.norm(again - matrix) / np.linalg.norm(matrix))
    print(
        f"{name}: {len(low)} elements (PyWavelets: {real.rec_len}), norm^2 {low @ low:.4f}, largest product with a "
        f"shift {shifted:.4f}, there and back {error:.4f} off"
    )
    (bad if name in ("coif4", "coif5") else good).append(error)
holds = max(good) < 1e-6 and min(bad) > 1e-3
print("holds" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" check.py
