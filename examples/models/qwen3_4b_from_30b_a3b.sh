#!/usr/bin/env bash
# Qwen3-4B from the mixture Qwen3-30B-A3B, 8 GPUs of 80 GB: two replicas of four GPUs, 16 of the 128 experts on each.
# The teacher has four key-value heads, hence at most TP 4; experts are whole (ETP 1) and dealt over all eight GPUs.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen3-4B}
TEACHER=${TEACHER:-models/Qwen3-30B-A3B}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 4 --sequence-parallel
  --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
)
launch "$@"
