#!/bin/bash
# The fixed-context regression on SmolLM2-135M (teacher) and the same model without two of its thirty layers (student):
# one bank of the untrained student's contexts, and what full distillation and TA-OPD at 10 % changed there.
# From the root of the repository, after `make demo` or with its packages installed; steps that are done are skipped.
#   bash examples/reproduce_small/smollm2.sh build/smollm2
set -euo pipefail
out=${1:-build/smollm2}
python=${PYTHON:-python}
taopd() { "$python" -m megatron_taopd "$@"; }

"$python" examples/quickstart/prepare.py --out "$out" --num-heldout 120 --num-train 400
models=(--student "$out/student" --teacher "$out/teacher")

contexts=$out/bank_rollouts.jsonl
[ -f "$contexts" ] || taopd rollout --student "$out/student" --prompt-data "$out/heldout_prompts.jsonl" \
    --max-prompt-length 96 --max-response-length 48 --seed 1 --output "$contexts"
[ -d "$out/bank" ] || taopd diagnose bank "${models[@]}" --rollout-data "$contexts" --micro-batch-size 4 --output "$out/bank"

gains=()
for method in full teachability; do
    choice=(--selector "$method")
    [ "$method" = full ] || choice+=(--keep-ratio 0.1)
    [ -d "$out/$method/hf" ] || taopd train "${models[@]}" "${choice[@]}" \
        --prompt-data "$out/train_prompts.jsonl" --max-prompt-length 96 --max-response-length 48 \
        --loss forward_kl --global-batch-size 8 --micro-batch-size 4 --train-iters 30 \
        --lr 4e-5 --lr-warmup-iters 2 --lr-decay-style linear --weight-decay 0 --seed 1 \
        --save "$out/$method/checkpoints" --load "$out/$method/checkpoints" --save-interval 10 \
        --log-dir "$out/$method" --export-hf "$out/$method/hf"
    [ -f "$out/$method.parquet" ] || taopd diagnose gain --bank "$out/bank" --checkpoint "$out/$method/hf" \
        --micro-batch-size 4 --output "$out/$method.parquet"
    gains+=(--gain "$out/$method.parquet")
done
rm -rf "$out/diagnosis"
taopd diagnose report --bank "$out/bank" "${gains[@]}" --output "$out/diagnosis"
