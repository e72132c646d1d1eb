#!/usr/bin/env bash
# All that one GPU can tell, in ten minutes: bench/gpu.sh [PART ...]   (default: the first six, the most valuable first)
#
#   part     seconds  what
#   correct     90    every kernel against float64 (bench/correct.py)
#   start      160    seconds until the clock starts, cold, warm and from one file, of $RECORDS at full width (start.py)
#   steps      130    milliseconds a step and memory of the same, with what `start` has compiled; no step may wait for it
#   kernels     80    every operation of a step by torch, torch.compile and us, attention by every backend (kernels.py)
#   train       60    200 steps of record 33 at scale small, with their curve (train.py)
#   tune        50    other tiles for the Triton kernels, as many as the time allows (tune.py)
#   ours       120    by name only: milliseconds a step of record 33 with all kernels of ours
#   experts    180    by name only: variants/2 against its parent (experts.py)
#
# The first six are 570 seconds, the rest is for starting. A part may take its share of what is left of $BUDGET seconds
# (570), so what one leaves over goes to those behind it; then it is stopped, with exit code 1, and keeps the rows it has.
# How long a GPU takes to compile a record is not known yet: if it is a minute and a half, `start` has time for one record,
# and `steps` compiles the others. All in full, where half an hour is at hand, takes three calls: `correct kernels tune`,
# `start steps` and `train ours experts`.
#
# Results: JSON and Markdown in $OUT (default bench/results/<name of the GPU>); those of an earlier run of the same parts are
# removed. Whatever fails is a row of its own, and exit code 1. Compiled code stays in $SPEEDRUN_CACHE/bench.
# $RECORDS: default "short/33 short/11 short/21".
# $DATA: a folder of GPT-2 shards, *_train_*.bin and *_val_*.bin, or the same compressed, *.bin.xz or *.bin.gz (shards.py);
# `train` reads 10 million tokens, 2.1 million for validation. Default: data/fineweb10B if it is there, else random tokens.
# $SPEEDRUN_PYTHON: the interpreter (python.sh). On a machine without a GPU this says what it would do; correct.py, steps.py,
# start.py, train.py and experts.py run there by themselves.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
declare -A seconds=([correct]=90 [start]=160 [steps]=130 [kernels]=80 [train]=60 [tune]=50 [ours]=120 [experts]=180)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(correct start steps kernels train tune)
for part in "${parts[@]}"; do
    if [ -z "${seconds[$part]:-}" ]; then
        echo "unknown part $part: choose from correct, start, steps, kernels, train, tune, ours, experts" >&2
        exit 2
    fi
done
. bench/python.sh
BUDGET=${BUDGET:-570}
name=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-') if torch.cuda.is_available() else '')")
# the seconds of part $1, when these are still to come
share() {
    local all=0 p
    for p in "$@"; do all=$((all + seconds[$p])); done
    echo $(((BUDGET - SECONDS) * seconds[$1] / all))
}
if [ -z "$name" ]; then
    all=0
    for part in "${parts[@]}"; do all=$((all + seconds[$part])); done
    echo "no GPU here; on one this would run, within $BUDGET seconds:"
    for part in "${parts[@]}"; do echo "  $part, $((BUDGET * seconds[$part] / all)) s or more"; done
    exit 0
fi
OUT=${OUT:-bench/results/$name}
mkdir -p "$OUT"
declare -A file=([correct]=correct [start]=start [steps]=steps [kernels]=kernels [train]=train [tune]=tiles
                 [ours]=steps-triton [experts]=experts)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case " ${parts[*]} " in *" start "* | *" steps "* | *" train "* | *" ours "* | *" experts "*)
    if [ -z "${DATA:-}" ] && compgen -G "data/fineweb10B/*_train_*.bin" >/dev/null; then DATA=data/fineweb10B; fi
    if [ -n "${DATA:-}" ]; then DATA=$("$PYTHON" bench/shards.py "$scratch/unpacked" "$DATA")
    else DATA=$("$PYTHON" bench/shards.py "$scratch/random-tokens"); fi ;;
esac
for part in "${parts[@]}"; do rm -f "$OUT/${file[$part]}.json" "$OUT/${file[$part]}.md"; done
caches=${SPEEDRUN_CACHE:-data/cache}/bench  # what `start` compiles; kept for the next call
read -ra records <<<"${RECORDS:-short/33 short/11 short/21}"
OURS=(--set system.cuda_graphs=true)  # every kernel of ours, to compare with torch's own
kernels=(loss mlp muon qk)
if "$PYTHON" -c "import sys, torch; sys.exit(torch.cuda.get_device_capability() < (8, 9))"; then kernels+=(transpose); fi  # FP8
for kernel in "${kernels[@]}"; do OURS+=(--set "system.kernels.$kernel=triton"); done
# bench $1.py with arguments, stopped where the part's time ends
bench() {
    timeout -k 10 "$limit" "$PYTHON" "bench/$1.py" "${@:2}" --out "$OUT/${file[$part]}.json" || {
        local code=$?
        failed=1
        if [ $code = 124 ] || [ $code = 137 ]; then
            echo "stopped after $limit s: bench/$1.py; the rows that it has are in $OUT"
        fi
    }
}
failed=0
for ((i = 0; i < ${#parts[@]}; i++)); do
    part=${parts[i]}
    limit=$(share "${parts[@]:i}")
    echo "== $part (at most $limit s)"
    if [ "$limit" -lt 1 ]; then echo "no time is left for it"; failed=1; continue; fi
    case $part in
        correct) bench correct ;;
        start)   bench start "${records[@]}" --data "$DATA" --caches "$caches" ;;
        steps)   bench steps "${records[@]}" --data "$DATA" --caches "$caches" --check-sync ;;
        kernels) bench kernels ;;
        train)   bench train short/33 --data "$DATA" ;;
        tune)    bench tune --limit $((limit / 12 + 1)) ;;  # of about nine shapes
        ours)    bench steps short/33 --data "$DATA" --caches "$caches/ours" "${OURS[@]}" ;;
        experts) bench experts variants/2 --scale small --data "$DATA" --repeats 3 ;;
    esac
done
echo "results: $OUT, after $SECONDS s"
exit $failed
