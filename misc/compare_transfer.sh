#!/usr/bin/env bash
# Embedding transfer on glyphs: students of 16 dimensions by three losses, from one teacher of 128, beside Proxy-Anchor
# with 16 dimensions alone; three seeds each, one network, and the same number of steps. compare.py prints the table and
# draws misc/transfer.svg. "misc/compare_transfer.sh draw" draws existing runs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
runs=$root/logs/transfer  # of this script alone, and made anew
if [ "${1:-}" != draw ]; then
    rm -rf "$runs"
    glyphs="--dataset glyphs --workers 0 --wandb disabled"
    export OMP_NUM_THREADS=1
    # shellcheck disable=SC2086 (flags)
    python "$root/train.py" $glyphs --LOG_DIR "$runs/teacher"
    teacher=$(echo "$runs"/teacher/logs_glyphs/*/glyphs_resnet18_best.pth)
    for seed in 1 2 3; do
        # shellcheck disable=SC2086
        python "$root/train.py" $glyphs --LOG_DIR "$runs" --seed $seed --embedding-size 16
        for loss in Relaxed_Contra RKD PKT; do
            # shellcheck disable=SC2086
            python "$root/transfer.py" $glyphs --LOG_DIR "$runs" --seed $seed --embedding-size 16 --loss $loss \
                --source-ckpt "$teacher"
        done
    done
fi
python "$root/misc/compare.py" "$runs"/logs_glyphs/* --save "$root/misc/transfer.svg"
