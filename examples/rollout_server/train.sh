#!/usr/bin/env bash
# Trains with responses of a server that serve.sh has started.
#
#   API=sglang URL=http://node7:30000 STUDENT=… TEACHER=… PROMPT_DATA=… OUTPUT=runs/served \
#       bash examples/rollout_server/train.sh
#
# Variables:
#   API          vllm or sglang
#   URL          root of the server; several, separated by blanks
#   STUDENT, TEACHER, PROMPT_DATA
#   OUTPUT       of the run; OUTPUT/weights must be there for the server under the same path
#   RANKS        processes on this machine (default 8; 0: this one alone, without torchrun)
#   EVERY        steps between two updates of the server's weights (default 1)
#   ROLLOUT_KEY  as for serve.sh
#   DRY_RUN=1    print the command, a word a line
# Further words are flags of `taopd train` and win.
set -euo pipefail

: "${API:?vllm or sglang}" "${URL:?root of the server}" "${STUDENT:?}" "${TEACHER:?}" "${PROMPT_DATA:?}" "${OUTPUT:?}"
RANKS=${RANKS:-8}
EVERY=${EVERY:-1}

words=()
if ((RANKS)); then
  words+=(torchrun --nproc-per-node "$RANKS" -m megatron_taopd)
else
  words+=(python3 -m megatron_taopd)
fi
words+=(
  train --student "$STUDENT" --teacher "$TEACHER" --prompt-data "$PROMPT_DATA"
  --rollout-engine openai --rollout-api "$API"
  --rollout-weights-every "$EVERY" --rollout-weights-dir "$OUTPUT/weights"
  --temperature 1.0 --max-prompt-length 1024 --max-response-length 4096 --num-samples-per-prompt 4
  --selector teachability --keep-ratio 0.1 --loss reverse_kl --importance-ratio prefix
  --micro-batch-size 1 --global-batch-size 64 --train-iters 300 --lr 1e-6
  --save "$OUTPUT/checkpoints" --load "$OUTPUT/checkpoints" --save-interval 20 --log-dir "$OUTPUT" --export-hf "$OUTPUT/hf"
)
for url in $URL; do
  words+=(--rollout-url "$url")
done
if [[ -n ${ROLLOUT_KEY:-} ]]; then
  export ROLLOUT_KEY
  words+=(--rollout-api-key-env ROLLOUT_KEY)
fi
words+=("$@")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%s\n' "${words[@]}"
  exit
fi
exec "${words[@]}"
