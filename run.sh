#!/usr/bin/env bash
# Train. Without arguments: on a CPU the frozen preset tiny-v1 to its target; on GPUs the head of the lineage on FineWeb.
#   ./run.sh                       ./run.sh short/9 --seed 3                       ./run.sh short/11 --without optim.muon
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
processes=1
for n in 2 4 8; do if [ "$gpus" -ge "$n" ]; then processes=$n; fi; done

out=runs
args=("$@")
for ((i = 0; i < ${#args[@]}; i++)); do
    case ${args[i]} in
        --out) out=${args[i + 1]:-runs} ;;
        --out=*) out=${args[i]#--out=} ;;
    esac
done
named=no
scaled=no
previous=
for a in "$@"; do
    case $a in --scale | --scale=*) scaled=yes ;; esac
    case $previous in --scale | --set | --with | --without | --revert | --seed | --data | --out | --profile) ;; *)
        case $a in -*) ;; *) named=$a ;; esac ;;
    esac
    previous=$a
done

if [ "$gpus" -eq 0 ]; then
    if [ "$named" = no ] && [ "$scaled" = no ]; then set -- tiny-v1 "$@"
    elif [ "$named" = no ]; then set -- short/head "$@"
    elif [ "$scaled" = no ] && [ ! -e "records/presets/$named.toml" ]; then set -- "$@" --scale tiny; fi
    launch=("$PYTHON")
else
    if [ "$named" = no ]; then set -- short/head "$@"; fi
    launch=("$PYTHON" -m torch.distributed.run --standalone "--nproc_per_node=$processes")
fi

mkdir -p "$out" 2>/dev/null || true
marker=$(mktemp)
trap 'rm -f "$marker"' EXIT
code=0
"${launch[@]}" train_gpt.py "$@" --save || code=$?

# a person's ending: the curve as a picture, and a sample of what was trained
newest=$(find "$out" -maxdepth 2 -name checkpoint.pt -newer "$marker" 2>/dev/null | sort | tail -n 1)
if [ -n "$newest" ]; then
    "$PYTHON" -m records plot "$(dirname "$newest")" || true
    "$PYTHON" sample.py "$newest" --tokens 60 || true
fi
exit "$code"
