#!/usr/bin/env bash
# Run tests/test_cuda.py and the benchmarks on a machine with one GPU, in less than ten minutes. One Markdown table goes
# to the file and to standard output, the progress to standard error.
#
#   benchmarks/gpu.sh results.md
#   benchmarks/gpu.sh --small results.md     sizes that measure nothing, on any device: does everything run?
#
# Libraries that are not installed are named in the table. PYTHON is the interpreter, python if unset. Left out are
# processes.py, which needs two GPUs, and kills.py, which compares bits: a GPU's sums differ from run to run.
set -uo pipefail

small=
if [ "${1:-}" = --small ]; then small=1; shift; fi
if [ $# -ne 1 ]; then echo "usage: benchmarks/gpu.sh [--small] FILE" >&2; exit 2; fi
file=$(realpath -m "$1")
python=${PYTHON:-python}
cd "$(dirname "$0")/.." || exit

if [ ! "$small" ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: there is no CUDA device here; --small runs on any" >&2
    exit 1
fi

failures=0
row() { printf '| `%s` | %s | %s | %s |\n' "$@" >> "$file"; }

# Run python with these arguments: rows of its output become rows of the table, and so does a failure.
run() {
    local output status command="${*#benchmarks/}"
    echo "== $command" >&2
    output=$(timeout $((SECONDS < 590 ? 600 - SECONDS : 10)) "$python" "$@" 2>&1 | tee /dev/stderr)
    status=$?
    grep '^| ' <<< "$output" | sed "s#^|#| \`$command\` |#" | tr -s ' ' >> "$file"
    if [ $status -ne 0 ]; then
        row "$command" "failed" "exit status $status" ""
        failures=$((failures + 1))
    fi
}

{
    "$python" -c "import torch; from proxy_anchor import hardware; print(hardware.describe(hardware.select(0)), f'torch {torch.__version__}.')"
    if [ "$small" ]; then echo; echo "Sizes that measure nothing."; fi
    echo
    echo "| command | what | measured | compared |"
    echo "|---|---|---|---|"
} > "$file" || exit

for library in wandb pytorch_metric_learning faiss; do
    "$python" -c "import $library" 2> /dev/null || row "import $library" "not installed" "" ""
done

echo "== tests/test_cuda.py" >&2
output=$(timeout 400 "$python" -m pytest tests/test_cuda.py -q --tb=short -rfE 2>&1 | tee /dev/stderr)
status=$?
if [ $status -ne 0 ]; then failures=$((failures + 1)); fi
row tests/test_cuda.py "$(tail -n 1 <<< "$output")" "exit status $status" ""
grep -E '^(FAILED|ERROR) ' <<< "$output" | tr '|' '/' | while read -r outcome test; do row "$test" "$outcome" "" ""; done

if [ "$small" ]; then
    run benchmarks/loss_time.py --batch 8 --classes 20 --size 8 --rounds 1
    run benchmarks/loss_memory.py --batch 8 --size 8 --classes 50 --most 100
    run benchmarks/recall_time.py --images 2100 --size 8 --rounds 1
    run benchmarks/recall_time.py --memory --images 2100 --size 8
    run benchmarks/throughput.py --loaders --images 4 --seconds 0.05
    run benchmarks/throughput.py --models resnet18 --batch-size 4 --steps 1 --images 12 --workers 1
else
    run benchmarks/loss_time.py
    run benchmarks/loss_memory.py
    run benchmarks/recall_time.py
    run benchmarks/recall_time.py --memory --images 60502
    run benchmarks/throughput.py --loaders --images 300 --seconds 1
    run benchmarks/throughput.py --models bn_inception resnet50 --amp bf16 --steps 20
    run benchmarks/throughput.py --models bn_inception --amp none --steps 20
fi
cat "$file"
if [ $failures -ne 0 ]; then echo "gpu.sh: $failures of the commands failed" >&2; exit 1; fi
