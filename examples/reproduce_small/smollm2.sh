#!/bin/bash
# The fixed-context regression on SmolLM2-135M (teacher) and the same model without two of its thirty layers (student):
# one bank of the untrained student's contexts, and what full distillation and TA-OPD at 10 % changed there.
# From the root of the repository, after `make demo` or with its packages installed; steps that are done are skipped.
#   bash examples/reproduce_small/smollm2.sh build/smollm2                   # one training seed a method
#   SEEDS="1 2 3" bash examples/reproduce_small/smollm2.sh build/smollm2     # several: prompt order and sampling vary
set -euo pipefail
out=${1:-build/smollm2}
read -ra seeds <<< "${SEEDS:-1}"
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
    for seed in "${seeds[@]}"; do
        name=$method
        [ "$seed" = 1 ] || name=$method-seed-$seed
        [ -d "$out/$name/hf" ] || taopd train "${models[@]}" "${choice[@]}" \
            --prompt-data "$out/train_prompts.jsonl" --max-prompt-length 96 --max-response-length 48 \
            --loss forward_kl --global-batch-size 8 --micro-batch-size 4 --train-iters 30 \
            --lr 4e-5 --lr-warmup-iters 2 --lr-decay-style linear --weight-decay 0 --seed "$seed" \
            --save "$out/$name/checkpoints" --load "$out/$name/checkpoints" --save-interval 10 \
            --log-dir "$out/$name" --export-hf "$out/$name/hf"
        [ -f "$out/$name.parquet" ] || taopd diagnose gain --bank "$out/bank" --checkpoint "$out/$name/hf" \
            --micro-batch-size 4 --output "$out/$name.parquet"
        gains+=(--gain "$out/$name.parquet")
    done
done
rm -rf "$out/diagnosis"
taopd diagnose report --bank "$out/bank" "${gains[@]}" --output "$out/diagnosis"
