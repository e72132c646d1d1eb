#!/usr/bin/env bash
# All that one GPU can tell, in parts of some minutes: bench/gpu.sh [correct|sync|tune|kernels|steps|start|experts|train ...]   (default: all)
# Results: JSON in $OUT (default bench/results/<name of the GPU>). Shards for `train`: $DATA (default data/fineweb10B).
# On a machine without a GPU it says what it would do; bench/correct.py, steps.py, start.py and experts.py run there by themselves.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup_venv.sh
name=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-') if torch.cuda.is_available() else '')")
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(correct sync tune kernels steps start experts train)
for part in "${parts[@]}"; do
    case $part in
        correct|sync|tune|kernels|steps|start|experts|train) ;;
        *) echo "unknown part $part: choose from correct, sync, tune, kernels, steps, start, experts, train" >&2; exit 2 ;;
    esac
done
if [ -z "$name" ]; then
    echo "no GPU here; on one this would run: ${parts[*]}"
    exit 0
fi
OUT=${OUT:-bench/results/$name}
mkdir -p "$OUT"
OURS=(--set system.cuda_graphs=true)  # every kernel of ours, to compare with torch's own
kernels=(loss mlp muon qk)
if "$PYTHON" -c "import sys, torch; sys.exit(torch.cuda.get_device_capability() < (8, 9))"; then kernels+=(transpose); fi  # FP8
for kernel in "${kernels[@]}"; do OURS+=(--set "system.kernels.$kernel=triton"); done
failed=0
for part in "${parts[@]}"; do
    echo "== $part"
    case $part in
        correct) "$PYTHON" bench/correct.py --out "$OUT/correct.json" ;;
        sync)    for record in short/11 short/21 short/33; do  # no step of them may wait for the GPU
                     "$PYTHON" train_gpt.py "$record" --scale small ${DATA:+--data "$DATA"} --set schedule.steps=10 \
                         --check-sync --out "$OUT/runs" || failed=1
                 done ;;
        tune)    "$PYTHON" bench/tune.py --out "$OUT/tiles.json" ;;
        kernels) "$PYTHON" bench/kernels.py --out "$OUT/kernels.json" ;;
        steps)   "$PYTHON" bench/steps.py short/11 short/21 short/33 --out "$OUT/steps.json" || failed=1
                 "$PYTHON" bench/steps.py short/33 "${OURS[@]}" --out "$OUT/steps-triton.json" ;;
        start)   "$PYTHON" bench/start.py short/11 short/21 short/33 --out "$OUT/start.json" ;;
        experts) "$PYTHON" bench/experts.py --scale small ${DATA:+--data "$DATA"} --repeats 3 --out "$OUT/experts.json" ;;
        train)   "$PYTHON" train_gpt.py short/33 --scale small ${DATA:+--data "$DATA"} --out "$OUT/runs" ;;
    esac || failed=1
done
echo "results: $OUT"
exit $failed
