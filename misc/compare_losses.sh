#!/usr/bin/env bash
# Six losses on glyphs, three seeds each, with one recipe and budget, drawn by compare.py into misc/losses.svg.
# The losses that compare images with each other need several images per class in a batch: they have --IPC 4.
# "misc/compare_losses.sh draw" only draws the runs that exist.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
runs=$root/logs/losses  # of this script alone, and made anew
if [ "${1:-}" != draw ]; then
    rm -rf "$runs"
    for seed in 1 2 3; do
        for loss in Proxy_Anchor Proxy_NCA "MS --IPC 4" "Contrastive --IPC 4" "Triplet --IPC 4" "NPair --IPC 4"; do
            # shellcheck disable=SC2086 (the loss brings its own flags)
            OMP_NUM_THREADS=1 python "$root/train.py" --dataset glyphs --model resnet18 --pretrained none --image-size 32 \
                --embedding-size 128 --batch-size 64 --lr 5e-4 --warm 0 --bn-freeze 0 --epochs 4 --lr-decay-step 2 \
                --workers 0 --wandb disabled --LOG_DIR "$runs" --seed $seed --loss $loss
        done
    done
fi
python "$root/misc/compare.py" "$runs"/logs_glyphs/* --save "$root/misc/losses.svg"
