#!/usr/bin/env bash
# What several GPUs add: bench/eight.sh [RECORD ...]. Milliseconds per step and memory on 1, 2, 4 and 8 of them; then, if
# the FineWeb shards are there (DATA, default data/fineweb10B), the last record once to its target. JSON and Markdown in
# $OUT; a record that fails is a row.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. bench/python.sh
records=("$@")
[ ${#records[@]} -gt 0 ] || records=(short/11 short/21 short/33)
gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -lt 2 ]; then
    echo "$gpus GPUs here; on more this would time ${records[*]} on 1, 2, 4 and 8 of them"
    exit 0
fi
name=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")
OUT=${OUT:-bench/results/$gpus-$name}
mkdir -p "$OUT"
failed=0
for n in 1 2 4 8; do
    [ "$n" -gt "$gpus" ] || "$PYTHON" bench/steps.py "${records[@]}" --nproc "$n" --out "$OUT/steps-$n.json" || failed=1
done
DATA=${DATA:-data/fineweb10B}
if [ "$gpus" -ge 8 ] && [ -d "$DATA" ]; then
    "$PYTHON" train_gpt.py "${records[-1]}" --nproc 8 --data "$DATA" --out "$OUT/runs" || failed=1
fi
echo "results: $OUT"
exit $failed
