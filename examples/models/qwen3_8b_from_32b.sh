#!/usr/bin/env bash
# Qwen3-8B from Qwen3-32B, 8 GPUs of 80 GB: two replicas of four GPUs.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen3-8B}
TEACHER=${TEACHER:-models/Qwen3-32B}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 4 --sequence-parallel
)
launch "$@"
