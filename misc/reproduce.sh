#!/usr/bin/env bash
# The six published recipes, and glyphs, on the datasets that are there: each with several seeds, once as published (the
# best epoch on the test set) and once without test-set selection (protocol.py). Ends in a table, logs/reproduce/results.md. It may be
# stopped or killed at any time: the same command continues.
#   misc/reproduce.sh                                    everything
#   misc/reproduce.sh --workers 8 --amp bf16             with more flags of train.py, for all recipes
#   DATASETS="cub glyphs" SEEDS="1 2" misc/reproduce.sh  some of it; DATA and LOGS are other folders than data/ and logs/
#   misc/reproduce.sh commands                           only prints what it would run
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
data=${DATA:-$root/data} logs=${LOGS:-$root/logs/reproduce}
seeds=${SEEDS:-1 2 3} datasets=${DATASETS:-cub cars SOP Inshop glyphs}
recipes=(
    "--dataset cub --model bn_inception --embedding-size 512 --batch-size 180 --lr 1e-4 --warm 1 --bn-freeze 1 --lr-decay-step 10"
    "--dataset cub --model resnet50 --embedding-size 512 --batch-size 120 --lr 1e-4 --warm 5 --bn-freeze 1 --lr-decay-step 5"
    "--dataset cars --model bn_inception --embedding-size 512 --batch-size 180 --lr 1e-4 --warm 1 --bn-freeze 1 --lr-decay-step 20"
    "--dataset cars --model resnet50 --embedding-size 512 --batch-size 120 --lr 1e-4 --warm 5 --bn-freeze 1 --lr-decay-step 10"
    "--dataset SOP --model bn_inception --embedding-size 512 --batch-size 180 --lr 6e-4 --warm 1 --bn-freeze 0 --lr-decay-step 20 --lr-decay-gamma 0.25"
    "--dataset Inshop --model bn_inception --embedding-size 512 --batch-size 180 --lr 6e-4 --warm 1 --bn-freeze 0 --lr-decay-step 20 --lr-decay-gamma 0.25"
    "--dataset glyphs"
)
run() {
    printf '%q ' "$@"; echo
    [ -n "${dry:-}" ] || "$@"
}
[ "${1:-}" != commands ] || { dry=1; shift; }

# Which datasets are not there, and how to get them.
absent=$(cd "$root" && python - "$data" "$datasets" << 'PYTHON'
import sys
from pathlib import Path
import dataset
for name in sys.argv[2].split():
    source = dataset.BENCHMARKS[name]
    if name != "glyphs" and not (folder := Path(sys.argv[1]) / source.FOLDER).exists():
        print(f"{name}: there is no {folder}. {source.SOURCE}")
PYTHON
)
[ -z "$absent" ] || printf 'Left out, see docs/data.md:\n%s\n' "$absent"

chosen=()
for recipe in "${recipes[@]}"; do
    name=${recipe#--dataset } name=${name%% *}
    case " $datasets " in *" $name "*) ;; *) continue ;; esac
    chosen+=("$recipe${*:+ $*}")
    ! grep -q "^$name: " <<< "$absent" || continue
    # shellcheck disable=SC2086 (flags)
    for seed in $seeds; do
        run python "$root/train.py" $recipe --data-root "$data" --LOG_DIR "$logs" --seed $seed --resume auto "$@"
    done
    # shellcheck disable=SC2086 (flags)
    run python "$root/protocol.py" --seeds $seeds -- $recipe --data-root "$data" --LOG_DIR "$logs" "$@"
done
[ -z "${dry:-}" ] || exit 0
# shellcheck disable=SC2086 (numbers)
python "$root/misc/results_table.py" --logs "$logs" --seeds $seeds -- "${chosen[@]}" > "$logs/results.tmp"
{ cat "$logs/results.tmp"; [ -z "$absent" ] || printf '\nLeft out, see docs/data.md:\n\n%s\n' "$absent"; } > "$logs/results.md"
rm "$logs/results.tmp"
cat "$logs/results.md"
echo "The table is $logs/results.md"
