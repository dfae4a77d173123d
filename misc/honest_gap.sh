#!/usr/bin/env bash
# What choosing the epoch on the test set adds on glyphs: protocol.py with ten seeds and four epochs, half an hour on one
# core, into logs/honest_gap. Started again it continues.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
OMP_NUM_THREADS=1 python "$root/protocol.py" --seeds {1..10} --out "$root/logs/honest_gap/results" -- --dataset glyphs \
    --epochs 4 --lr-decay-step 2 --workers 0 --wandb disabled --LOG_DIR "$root/logs/honest_gap" "$@"
