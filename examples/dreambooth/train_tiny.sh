#!/usr/bin/env bash
# Trains the three adapters of the demo on the embedded pipeline: one subject and two styles, two to six minutes each
# on one CPU core. Run it from anywhere, with the environment that has diffadapt[train] active:
#
#     examples/dreambooth/train_tiny.sh [critter] [ink] [pixel]
set -euo pipefail
cd "$(dirname "$0")"

base=${BASE:-../tiny_pipeline}
work=${WORK:-../../.cache/dreambooth}
output=${OUTPUT:-$base/adapters}
threads=${OMP_NUM_THREADS:-1} # beside a busy neighbour one thread is faster than two

train() { # name, further options
    local name=$1
    shift
    OMP_NUM_THREADS=$threads "${PYTHON:-python}" train_dreambooth.py \
        --pretrained_model_name_or_path "$base" \
        --instance_data_dir "data/$name" \
        --output_dir "$work/$name" \
        --rank 8 --lora_layers all \
        --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 20 \
        --cache_latents \
        --validation_guidance_scale 2.5 --validation_steps 1000 \
        --save_precision fp16 \
        "$@"
    mkdir -p "$output"
    cp "$work/$name/pytorch_lora_weights.safetensors" "$output/$name.safetensors"
}

critter() {
    train critter --instance_prompt "a sks critter" --max_train_steps 450 --train_batch_size 6 \
        --with_prior_preservation --prior_loss_weight 0.5 \
        --class_data_dir "$work/class" --class_prompt tiny_class_prompts.txt --num_class_images 24 \
        --class_guidance_scale 2.5 --sample_batch_size 8 \
        --validation_prompt "a sks critter on a yellow background"
}

ink() {
    train ink --max_train_steps 300 --train_batch_size 8 --validation_prompt "a red star on a blue background"
}

pixel() {
    train pixel --max_train_steps 200 --train_batch_size 8 --validation_prompt "a red star on a blue background"
}

[ $# -gt 0 ] || set -- critter ink pixel
for name in "$@"; do
    "$name"
done
