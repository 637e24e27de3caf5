#!/usr/bin/env bash
# Qwen2.5-7B from Qwen2.5-72B, 8 GPUs of 80 GB: one replica in two stages (the student has four key-value heads).
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen2.5-7B-Instruct}
TEACHER=${TEACHER:-models/Qwen2.5-72B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 4 --sequence-parallel
  --pipeline-model-parallel-size 2
)
launch "$@"
