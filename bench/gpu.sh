#!/usr/bin/env bash
# What a borrowed GPU can tell in one call of less than ten minutes: bench/gpu.sh [--rehearse] [PART ...]
#
#   part      seconds  what
#   cold        170    record 33 at full width from empty caches, in one process: seconds until the clock starts,
#                      milliseconds a step, memory, and that no step waits for the GPU (steps.py)
#   train        70    200 steps at scale small; the first ten losses against those of the CPU (train.py, reference.py)
#   correct      70    what these two ran, against float64 in one dtype: attention, FP8, compiled (correct.py)
#   kernels      70    head and loss, attention, MLP by torch, torch.compile and us (kernels.py)
#   records     140    $RECORDS as `cold`, one after the other; those that do not fit in are left for another day
#   warm         30    record 33 again, with what `cold` has compiled: seconds until the clock starts
#   start       200    by name only: a cold, a warm start and one from a file, of record 33 (start.py)
#   exact       180    by name only: every kernel in every dtype against float64 (correct.py)
#   operations  180    by name only: every operation of a step (kernels.py)
#   curve        90    by name only: 200 steps of record 33 at scale small on $DATA (train.py)
#   ours        120    by name only: record 33 with all kernels of ours
#   tune        120    by name only: other tiles for the Triton kernels, as many as the time allows (tune.py)
#   experts     180    by name only: variants/2 against its parent (experts.py)
#
# Without a PART these are the first six, the most valuable first, together 550 of the $BUDGET seconds (560); the rest is
# for starting. A part gets its share of what is left, so what one leaves over goes to those behind it; then it is stopped,
# with exit code 1, and keeps the rows it has. Call it again, today or on another day: a part whose result is complete is
# left alone (name it to do it again), and one that was cut goes on where the same code on the same card left it.
#
# Results: JSON and Markdown in $OUT (default bench/results/<name of the GPU>), whole after every row. Whatever fails is a
# row of its own, and exit code 1. Compiled code stays in $SPEEDRUN_CACHE/bench.
# $DATA: a folder of GPT-2 shards, *_train_*.bin and *_val_*.bin, or the same compressed, *.bin.xz or *.bin.gz (shards.py).
# Default: data/fineweb10B if it is there, otherwise random tokens. `train` makes its own.
# $SPEEDRUN_PYTHON: the interpreter (python.sh). On a machine without a GPU this says what it would do.
# --rehearse runs the parts at once on what is here, a CPU at micro or the null device (tests/nullcuda), times nothing, and
# fails if a part leaves no whole result. Its results go to a folder that is removed, or to $OUT.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
# 92 is left out: with its whole table a step takes more than an H200 has, 146 GiB by estimate
RECORDS=${RECORDS:-short/57 short/11 short/21 short/89}
declare -A seconds=([cold]=170 [train]=70 [correct]=70 [kernels]=70 [records]=140 [warm]=30
                    [start]=200 [exact]=180 [operations]=180 [curve]=90 [ours]=120 [tune]=120 [experts]=180)
declare -A file=([cold]=steps [train]=train [correct]=correct [kernels]=kernels [records]=steps-records [warm]=warm
                 [start]=start [exact]=exact [operations]=operations [curve]=curve [ours]=steps-triton [tune]=tiles
                 [experts]=experts)
rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=1; shift; fi
parts=("$@")
named=${parts[*]:+1}
[ ${#parts[@]} -gt 0 ] || parts=(cold train correct kernels records warm)
for part in "${parts[@]}"; do
    if [ -z "${seconds[$part]:-}" ]; then
        echo "unknown part $part: choose from cold, train, correct, kernels, records, warm, start, exact, operations," \
            "curve, ours, tune, experts" >&2
        exit 2
    fi
done
. bench/python.sh
BUDGET=${BUDGET:-560}
name=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-') if torch.cuda.is_available() else '')")
# the seconds of part $1, when these are still to come
share() {
    local all=0 p
    for p in "$@"; do all=$((all + seconds[$p])); done
    echo $(((BUDGET - SECONDS) * seconds[$1] / all))
}
if [ -z "$name" ] && [ -z "$rehearse" ]; then
    all=0
    for part in "${parts[@]}"; do all=$((all + seconds[$part])); done
    echo "no GPU here; on one this would run, within $BUDGET seconds:"
    for part in "${parts[@]}"; do echo "  $part, $((BUDGET * seconds[$part] / all)) s or more"; done
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "$rehearse" ]; then OUT=${OUT:-$scratch/results}; else OUT=${OUT:-bench/results/$name}; fi
mkdir -p "$OUT"
# whole: has part $1 left a result with nothing missing?
whole() { grep -qs '^ "complete": true' "$OUT/${file[$1]}.json"; }
resume=()
if [ -z "$named" ]; then
    resume=(--resume)
    todo=()
    for part in "${parts[@]}"; do
        if whole "$part"; then echo "$part: done before, in $OUT/${file[$part]}.md (name it to do it again)"
        else todo+=("$part"); fi
    done
    parts=(${todo[@]+"${todo[@]}"})
fi
caches=${SPEEDRUN_CACHE:-data/cache}/bench  # kept for the next call
# what a rehearsal makes small: sizes of trainings, numbers of steps, and on a CPU the device
how=() small=(--scale small) few=() short=() unjudged=() dtype=(--dtype bfloat16)
if [ -n "$rehearse" ]; then
    few=(--steps 4) short=(--rehearse) caches=$scratch/caches BUDGET=${REHEARSAL:-3600}
    if [ -n "$name" ]; then unjudged=(--rehearse); fi  # numbers of the null device mean nothing
    if [ -z "$name" ]; then
        how=(--scale micro --set system.device=cpu --set system.attention=banded) small=("${how[@]}") dtype=() DATA=none
    fi
fi
case " ${parts[*]-} " in *" cold "* | *" records "* | *" warm "* | *" start "* | *" curve "* | *" ours "* | *" experts "*)
    if [ -z "${DATA:-}" ] && compgen -G "data/fineweb10B/*_train_*.bin" >/dev/null; then DATA=data/fineweb10B; fi
    if [ "${DATA:-}" = none ]; then DATA=
    elif [ -n "${DATA:-}" ]; then DATA=$("$PYTHON" bench/shards.py "$scratch/unpacked" "$DATA")
    else DATA=$("$PYTHON" bench/shards.py "$scratch/random-tokens"); fi ;;
esac
data=()  # at micro there is a corpus without it
if [ -n "${DATA:-}" ]; then data=(--data "$DATA"); fi
read -ra records <<<"$RECORDS"
OURS=(--set system.cuda_graphs=true)  # every kernel of ours, to compare with torch's own
kernels=(loss mlp muon qk)
if "$PYTHON" -c "import sys, torch; c = torch.cuda; sys.exit(c.is_available() and c.get_device_capability() < (8, 9))"; then
    kernels+=(transpose)  # FP8
fi
for kernel in "${kernels[@]}"; do OURS+=(--set "system.kernels.$kernel=triton"); done
# bench $1.py with arguments, stopped where the part's time ends
bench() {
    timeout -k 10 "$limit" "$PYTHON" "bench/$1.py" "${@:2}" ${resume[@]+"${resume[@]}"} --out "$OUT/${file[$part]}.json" || {
        local code=$?
        failed=1
        if [ $code = 124 ] || [ $code = 137 ]; then
            echo "stopped after $limit s: bench/$1.py; the rows that it has are in $OUT"
        fi
    }
}
# a training bench with what all of them share
steps() { bench "$1" "${@:2}" ${data[@]+"${data[@]}"} ${few[@]+"${few[@]}"} ${how[@]+"${how[@]}"} --caches "$caches"; }
failed=0
for ((i = 0; i < ${#parts[@]}; i++)); do
    part=${parts[i]}
    limit=$(share "${parts[@]:i}")
    echo "== $part (at most $limit s)"
    if [ "$limit" -lt 1 ]; then echo "no time is left for it"; failed=1; continue; fi
    case $part in
        cold)       rm -rf "$caches/short-33"
                    steps steps short/33 --check-sync ;;
        train)      if [ ${#how[@]} -gt 0 ]; then bench train short/33 "${few[@]}" "${small[@]}"
                    else bench train --reference ${short[@]+"${short[@]}"} ${short[@]+--steps 10}; fi ;;
        correct)    bench correct --only attention fp8_linear fp8_loss compiled ${dtype[@]+"${dtype[@]}"} \
                        --as-in "$OUT/steps.json" ${unjudged[@]+"${unjudged[@]}"} ;;
        kernels)    bench kernels --only loss attention mlp ${short[@]+"${short[@]}"} ;;
        records)    steps steps "${records[@]}" --check-sync ;;
        warm)       steps steps short/33 --steps 4 ;;
        start)      steps start short/33 ;;
        exact)      bench correct ${unjudged[@]+"${unjudged[@]}"} ;;
        operations) bench kernels ${short[@]+"${short[@]}"} ;;
        curve)      bench train short/33 "${small[@]}" ${few[@]+"${few[@]}"} ${data[@]+"${data[@]}"} ;;
        ours)       caches=$caches/ours steps steps short/33 "${OURS[@]}" ;;
        tune)       bench tune --limit $((limit / 12 + 1)) ;;  # of about nine shapes
        experts)    bench experts variants/2 "${small[@]}" ${data[@]+"${data[@]}"} --repeats 3 ;;
    esac
    if [ -n "$rehearse" ] && ! whole "$part"; then
        echo "$part: left no whole result in $OUT/${file[$part]}.json"
        failed=1
    fi
done
echo "results: $OUT, after $SECONDS s"
exit $failed
