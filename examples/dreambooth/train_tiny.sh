#!/usr/bin/env bash
# Trains the three adapters of the demo on the embedded pipeline: one subject and two styles, some minutes each on one
# CPU core. Run it from anywhere, with the environment that has diffadapt[train] active:
#
#     examples/dreambooth/train_tiny.sh [critter] [ink] [pixel]
set -euo pipefail
cd "$(dirname "$0")"

work=${WORK:-../../.cache/dreambooth}
output=${OUTPUT:-../tiny_pipeline/adapters}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # beside a busy neighbour one thread is faster than two

[ $# -gt 0 ] || set -- critter ink pixel
mkdir -p "$output"
for name in "$@"; do
    "${PYTHON:-python}" -m diffadapt train "configs/tiny-$name.toml" --output_dir "$work/$name"
    cp "$work/$name/pytorch_lora_weights.safetensors" "$output/$name.safetensors"
done
