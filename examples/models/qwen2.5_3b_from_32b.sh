#!/usr/bin/env bash
# Qwen2.5-3B from Qwen2.5-32B, 8 GPUs of 80 GB: four replicas of two GPUs (the student has two key-value heads).
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen2.5-3B-Instruct}
TEACHER=${TEACHER:-models/Qwen2.5-32B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 2 --sequence-parallel
)
launch "$@"
