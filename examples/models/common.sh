# What the recipes of this directory share; sourced, not run. A recipe sets STUDENT, TEACHER and LAYOUT and calls `launch "$@"`.
#
# Variables (all can be set in the environment):
#   STUDENT, TEACHER   HF directories, or Megatron checkpoints made by `taopd convert hf-to-megatron`
#   PROMPT_DATA        prompts, JSONL (docs/file_formats.md)
#   OUTPUT             directory of checkpoints, metrics and TensorBoard events
#   GPUS_PER_NODE      default 8
#   NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#                      as torchrun wants them; run the same script once on every node
#   DRY_RUN=1          print the words of the command, one a line, and run nothing
# Words after the script's name are passed on and win: `qwen3_4b_from_32b.sh --keep-ratio 0.3 --train-iters 50`.
# shellcheck shell=bash

PROMPT_DATA=${PROMPT_DATA:-prompts.jsonl}
OUTPUT=${OUTPUT:-runs/$(basename "$0" .sh)}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

PRECISION=(
  --bf16
  --use-distributed-optimizer
)

SELECTION=(
  --selector teachability
  --keep-ratio 0.1
  --support-k 16
  --loss reverse_kl
)

TRAINING=(
  --num-samples-per-prompt 4
  --max-prompt-length 1024
  --max-response-length 4096
  --temperature 1.0
  --global-batch-size 128
  --micro-batch-size 1
  --train-iters 300
  --lr 1e-6
  --weight-decay 0.1
  --clip-grad 1.0
  --recompute-granularity full
  --recompute-method uniform
  --recompute-num-layers 1
)

# A recipe may add to any of these lists before it calls what follows.

# Fills TRAIN with the words of `taopd train`, and those given behind them.
train_words() {
  TRAIN=(
    train
    --student "$STUDENT" --teacher "$TEACHER" --prompt-data "$PROMPT_DATA"
    "${LAYOUT[@]}" "${PRECISION[@]}" "${SELECTION[@]}" "${TRAINING[@]}"
    --save "$OUTPUT/checkpoints" --save-interval 50 --load "$OUTPUT/checkpoints"
    --log-dir "$OUTPUT" --tensorboard-dir "$OUTPUT/tensorboard"
    "$@"
  )
}

launch() {
  train_words "$@"
  local words=(
    torchrun
    --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
    -m megatron_taopd "${TRAIN[@]}"
  )
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "${words[@]}"
  else
    # Megatron's order of work under tensor parallelism needs it on GPUs before Blackwell.
    CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} "${words[@]}"
  fi
}
